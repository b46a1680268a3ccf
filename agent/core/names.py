"""Names of endpoints by network, and the answer to a question by who asks.

A sandbox asks, and its address says which networks it is in: its view. It sees the names of
those networks only: NAME, NAME.NET and NAME.NET.vxmesh.internal, of endpoints, their aliases and
services, and the way back from an address. A service's name leads to its VIPs, or to its backends
if it has none; tasks.NAME always to the backends; SRV of _PORT._tcp.NAME to either, with the port.
What is ours is answered with authority, the answer "no such name" included, and never leaves:
everything under vxmesh.internal, under the name of a network of the view, single labels, and
addresses within our subnets. All else is for the host's resolvers, if a network of the view leads
out at all.

The price: in the sandboxes of a network called `dev`, names under the public top-level domain
`dev` cannot be resolved.

Sources: RFC 1034 and 1035, 2308 (negative answers), 2782 (SRV), 6761 (localhost), 8020 (a name
that is denied has nothing below it, so what lies between exists), 8482 (ANY).
What stands opposite: nametables.py holds a network's names; agent/resolver puts this on the wire;
explaining.py tells why, resolvconf.py how a sandbox comes to ask.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from agent.core.nametables import (
    NetworkNames,
    ServiceBackend,
    ServiceEntry,
    ServicePort,
)
from agent.core.question import (
    AAAA,
    ANY,
    PTR,
    SOA,
    SRV,
    A,
    Question,
    ReversePrefix,
    reverse_prefix,
)

ZONE = "vxmesh.internal"
TTL = 5  # seconds, of every record of ours and of "no such name"

TASKS = "tasks"  # tasks.NAME: the backends of a service

_ZONE_LABELS = ("vxmesh", "internal")


class Kind(Enum):
    """What is to be done with a question."""

    ANSWER = "answer"
    NODATA = "nodata"  # the name exists, with records of other types
    NXDOMAIN = "nxdomain"
    FORWARD = "forward"
    REFUSED = "refused"  # not ours, and the asker has no way out


class Srv(NamedTuple):
    """What an SRV record says (RFC 2782); the target is without its final dot."""

    priority: int
    weight: int
    port: int
    target: str


class Record(NamedTuple):
    """One record of the name that was asked; its TTL is `TTL`.

    `data` is an address (4 or 16 bytes) for A and AAAA, a name without its final dot for PTR.
    For SOA it is empty: the zone is that of the answer.
    """

    type: int
    data: bytes | str | Srv


class Answer(NamedTuple):
    """What to say. `zone` (no final dot; "" is the root) owns the SOA of a negative answer."""

    kind: Kind
    why: str
    records: tuple[Record, ...] = ()
    zone: str = ""
    network: str = ""  # id of the network that has the name
    additional: tuple[tuple[str, Record], ...] = ()  # addresses of SRV's targets


View = tuple[str, ...]
_LOOPBACK = {A: bytes((127, 0, 0, 1)), AAAA: bytes(15) + b"\1"}


class Stale(NamedTuple):
    """Whose answers may have changed: `names` are single labels, of whichever network, and
    addresses; `everything`, if a network did; `views`, if who asks is in other networks."""

    everything: bool
    views: bool
    names: frozenset[str | bytes]


class Names:
    """All names that this node's sandboxes may ask for, changed one by one.

    Names and aliases are DNS labels (agent.model.parse_name). Order does not matter: an
    endpoint may come before its network, a view before both.
    """

    def __init__(self) -> None:
        self.networks: dict[str, NetworkNames] = {}  # to be looked at only
        self._views: dict[bytes, View] = {}
        # version, prefix length -> base -> ids: of networks that share a subnet there are several
        self._subnets: dict[tuple[int, int], dict[int, list[str]]] = {}
        self._stale: set[str | bytes] | None = None
        self._all_stale = False
        self._views_stale = False

    def watch(self) -> None:
        """From now on note what `take_stale` returns."""
        self._stale, self._all_stale, self._views_stale = set(), False, False
        for network in self.networks.values():
            network.stale = self._stale

    def take_stale(self) -> Stale:
        """What may be answered otherwise than at the last call."""
        found = Stale(self._all_stale, self._views_stale, frozenset(self._stale or ()))
        if self._stale is not None:
            self._stale.clear()
        self._all_stale = self._views_stale = False
        return found

    def put_network(
        self, id: str, name: str, subnets: Iterable[str] = (), internal: bool = False
    ) -> None:
        """A network or what changed of it. `subnets` in CIDR; `internal`: no way out of it."""
        network = self._network(id)
        self._all_stale = True
        self._forget_subnets(id, network)
        network.name = name.lower()
        network.internal = internal
        for text in subnets:
            subnet = ipaddress.ip_network(text, strict=False)
            base = int(subnet.network_address) >> (subnet.max_prefixlen - subnet.prefixlen)
            network.subnets.append((subnet.version, subnet.prefixlen, base))
            bases = self._subnets.setdefault((subnet.version, subnet.prefixlen), {})
            bases.setdefault(base, []).append(id)

    def drop_network(self, id: str) -> None:
        """The network is gone, and every name in it. Nothing happens if there is none."""
        network = self.networks.pop(id, None)
        if network is not None:
            self._all_stale = True
            self._forget_subnets(id, network)

    def put(
        self,
        network_id: str,
        endpoint_id: str,
        name: str,
        aliases: Sequence[str],
        addresses: tuple[bytes, ...],
    ) -> None:
        """An endpoint or what changed of it; replaces all that was known of it.

        Of two endpoints with one address the later put is the one that the address leads to.
        """
        lowered = tuple([alias.lower() for alias in aliases]) if aliases else ()
        network = self.networks.get(network_id)
        if network is None:
            network = self._network(network_id)
        network.put(endpoint_id, (name.lower(), lowered, addresses))

    def drop(self, network_id: str, endpoint_id: str) -> None:
        """The endpoint is gone. Nothing happens if there is none."""
        network = self.networks.get(network_id)
        if network is not None:
            network.drop(endpoint_id)
            self._prune(network_id, network)

    def put_service(
        self,
        network_id: str,
        service_id: str,
        name: str,
        vips: Sequence[bytes] = (),
        backends: Sequence[ServiceBackend] = (),
        ports: Sequence[ServicePort] = (),
    ) -> None:
        """A service or what changed of it; replaces all that was known of it.

        `vips` (4 or 16 bytes each) is empty for one whose name leads to its backends (dnsrr).
        `backends` are those that answers are to name: healthy, not draining. Its name hides
        endpoints of the same name in its network.
        """
        entry = ServiceEntry(name.lower(), tuple(vips), tuple(backends), tuple(ports))
        self._network(network_id).put_service(service_id, entry)

    def drop_service(self, network_id: str, service_id: str) -> None:
        """The service is gone. Nothing happens if there is none."""
        network = self.networks.get(network_id)
        if network is not None:
            network.drop_service(service_id)
            self._prune(network_id, network)

    def _network(self, id: str) -> NetworkNames:
        network = self.networks.get(id)
        if network is None:
            network = self.networks[id] = NetworkNames(self._stale)
        return network

    def _prune(self, id: str, network: NetworkNames) -> None:
        if not network:
            del self.networks[id]

    def put_view(self, address: bytes, networks: View) -> None:
        """Who asks from `address` (4 or 16 bytes) is in these networks; the first counts first."""
        self._views[address] = networks
        self._views_stale = True

    def drop_view(self, address: bytes) -> None:
        """Nobody of ours has that address any more."""
        self._views.pop(address, None)
        self._views_stale = True

    def view(self, address: bytes) -> View:
        """Network ids of who asks from `address`; empty for a stranger."""
        return self._views.get(address, ())

    def counts(self) -> dict[str, int]:
        """How many networks, endpoints, services and views are known."""
        return {
            "networks": len(self.networks),
            "endpoints": sum(len(n.endpoints) for n in self.networks.values()),
            "services": sum(len(n.services) for n in self.networks.values()),
            "views": len(self._views),
        }

    def answer(self, question: Question, view: View, turn: int = 0) -> Answer:
        """What to say to `question` from a sandbox in the networks of `view`.

        Several addresses come in one order on every node, rotated by `turn`: counting it up
        from question to question makes a round robin.
        """
        labels = question.labels
        if labels[-2:] == _ZONE_LABELS:
            return self._in_zone(question, view, turn)
        if not labels:
            return self._outside(view)
        last = labels[-1]
        if last == "arpa" and (prefix := reverse_prefix(labels)) is not None:
            return self._reverse(question, prefix, view)
        if last == "localhost":
            return _localhost(question)
        if len(labels) == 1:
            return self._single(question, view, turn)
        for id in view:
            network = self.networks.get(id)
            if network is not None and network.name == last:
                found = self._in_network(id, labels[:-1], question.type, last, turn)
                if len(labels) > 2 or found.kind is not Kind.NXDOMAIN:
                    return found
                # "tasks" is no name there, but this network's name may be a service's as well.
                return self._of_service(question, view, turn) or found
        return self._of_service(question, view, turn) or self._outside(view)

    def _of_service(self, question: Question, view: View, turn: int) -> Answer | None:
        """tasks.NAME and _PORT._tcp.NAME without a network's name; None if it is not that."""
        labels = question.labels
        subject = subject_of(labels)
        if subject == 0 or subject != len(labels) - 1:
            return None
        name = labels[-1]
        for id in view:
            network = self.networks.get(id)
            if network is not None and name in network.named:
                return self._in_network(id, labels, question.type, name, turn)
        for id in view:
            network = self.networks.get(id)
            if network is not None and (name in network.names or name in network.departed):
                return Answer(Kind.NXDOMAIN, _NO_SUCH_SERVICE, zone=name, network=id)
        # No top-level domain has SRV records, while there are public names such as tasks.org.
        return Answer(Kind.NXDOMAIN, _SINGLE) if labels[0] != TASKS else None

    def _in_zone(self, question: Question, view: View, turn: int) -> Answer:
        above = question.labels[:-2]
        if not above:
            if question.type in (SOA, ANY):
                return Answer(Kind.ANSWER, _APEX, (Record(SOA, ""),), ZONE)
            return Answer(Kind.NODATA, _APEX, zone=ZONE)
        for id in view:
            network = self.networks.get(id)
            if network is not None and network.name == above[-1]:
                if len(above) == 1:
                    return Answer(Kind.NODATA, _NETWORK, zone=ZONE, network=id)
                return self._in_network(id, above[:-1], question.type, ZONE, turn)
        return Answer(Kind.NXDOMAIN, _NO_SUCH_NETWORK, zone=ZONE)

    def _single(self, question: Question, view: View, turn: int) -> Answer:
        label = question.labels[0]
        between = label == _ZONE_LABELS[-1]
        for id in view:
            network = self.networks.get(id)
            if network is None:
                continue
            if label in network:
                return self._in_network(id, (label,), question.type, label, turn)
            between = between or network.name == label
        if between:
            return Answer(Kind.NODATA, _NETWORK, zone=label)
        return Answer(Kind.NXDOMAIN, _SINGLE)

    def _in_network(
        self, id: str, labels: tuple[str, ...], type: int, zone: str, turn: int
    ) -> Answer:
        """What the network says of what was asked in front of its name."""
        network = self.networks[id]
        name = labels[-1]
        service = network.service(name)
        if len(labels) == 1:
            if service is not None:
                if not service.vips:
                    return self._backends(id, service, type, zone, turn)
                return _addresses(service.vips, type, zone, turn, id, _VIP)
            held = [network.endpoints[holder] for holder in network.holders(name, turn)]
            if not held:
                return Answer(Kind.NXDOMAIN, _NO_SUCH_NAME, zone=zone, network=id)
            found = [address for entry in held for address in entry[2]]
            return _addresses(found, type, zone, turn, id, _NAME)
        if service is None:
            why = _NO_SUCH_SERVICE if subject_of(labels) else _TOO_DEEP
            return Answer(Kind.NXDOMAIN, why, zone=zone, network=id)
        if labels[:-1] == (TASKS,):
            return self._backends(id, service, type, zone, turn)
        protocol = labels[-2].removeprefix("_")
        if len(labels) == 2 and any(f"_{port.protocol}" == labels[-2] for port in service.ports):
            return Answer(Kind.NODATA, _NETWORK, zone=zone, network=id)
        ports = []
        if len(labels) == 3 and labels[-2][0] == "_" == labels[0][0]:
            ports = service.find_ports(protocol, labels[0][1:])
        if not ports:
            why = _NO_SUCH_PORT if len(labels) == 3 else _TOO_DEEP
            return Answer(Kind.NXDOMAIN, why, zone=zone, network=id)
        if type not in (SRV, ANY):
            return Answer(Kind.NODATA, _NO_SUCH_TYPE, zone=zone, network=id)
        return self._targets(id, service, ports, zone, turn)

    def _backends(self, id: str, service: ServiceEntry, type: int, zone: str, turn: int) -> Answer:
        held = self.networks[id].backends(service, turn)
        if not held:
            return Answer(Kind.NODATA, _NO_BACKEND, zone=zone, network=id)
        found = [address for _, entry in held for address in entry[2]]
        return _addresses(found, type, zone, turn, id, _BACKENDS)

    def _targets(
        self, id: str, service: ServiceEntry, ports: list[ServicePort], zone: str, turn: int
    ) -> Answer:
        """SRV: the service itself if it has a VIP, else each backend."""
        network = self.networks[id]
        if service.vips:
            named = [(1, service.name, service.vips, True)]
        else:
            held = network.backends(service, turn)
            named = [(b.weight, entry[0], entry[2], False) for b, entry in held]
        records: dict[Record, None] = {}
        additional: dict[tuple[str, Record], None] = {}
        for weight, name, addresses, itself in named:
            target = ".".join(part for part in (name, network.name, ZONE) if part)
            for port in ports:
                number = port.port if itself else port.target
                records[Record(SRV, Srv(0, weight, number, target))] = None
            for address in addresses:
                additional[target, _record(address)] = None
        if not records:
            return Answer(Kind.NODATA, _NO_BACKEND, zone=zone, network=id)
        found = _turned(list(records), turn)
        return Answer(Kind.ANSWER, _SRV, found, zone, id, tuple(additional))

    def _reverse(self, question: Question, prefix: ReversePrefix, view: View) -> Answer:
        length = self._covered(prefix.version, prefix.value, prefix.bits)
        if not length:
            return self._outside(view)
        zone = prefix.zone(length)
        if prefix.excess:
            return Answer(Kind.NXDOMAIN, _NO_SUCH_ADDRESS, zone=zone)
        address = prefix.address
        if address is None:
            return Answer(Kind.NODATA, _NETWORK, zone=zone)
        for id in view:
            network = self.networks.get(id)
            name = network.bearer(address) if network is not None else ""
            if network is None or not name:
                continue
            if question.type not in (PTR, ANY):
                return Answer(Kind.NODATA, _NO_SUCH_TYPE, zone=zone, network=id)
            record = Record(PTR, ".".join(part for part in (name, network.name, ZONE) if part))
            return Answer(Kind.ANSWER, _ADDRESS, (record,), zone, id)
        return Answer(Kind.NXDOMAIN, _NO_SUCH_ADDRESS, zone=zone)

    def _covered(self, version: int, value: int, bits: int) -> int:
        """The prefix length of a network's subnet that a prefix lies in; 0 if in none."""
        for (of, prefix), bases in self._subnets.items():
            if of == version and prefix <= bits and value >> (bits - prefix) in bases:
                return prefix
        return 0

    def _outside(self, view: View) -> Answer:
        networks = [self.networks[id] for id in view if id in self.networks]
        if any(not network.internal for network in networks):
            return Answer(Kind.FORWARD, _OUTSIDE)
        return Answer(Kind.REFUSED, _INTERNAL if networks else _STRANGER)

    def _forget_subnets(self, id: str, network: NetworkNames) -> None:
        for version, prefix, base in network.subnets:
            bases = self._subnets[version, prefix]
            bases[base].remove(id)
            if not bases[base]:
                del bases[base]
            if not bases:
                del self._subnets[version, prefix]
        network.subnets = []


_NAME = "the network has this name"
_ADDRESS = "an endpoint of a network of the asker has this address"
_VIP = "a service of the network has this name; it is reached by its virtual address"
_BACKENDS = "a service of the network has this name; these backends take connections"
_SRV = "a service of the network has this port"
_NO_SUCH_PORT = "the service has no such port"
_NO_SUCH_SERVICE = "the network has no service of this name"
_NO_BACKEND = "the service has no backend that takes connections"
_APEX = f"{ZONE} is our own zone"
_NETWORK = "there are names below this one, but no record of it"
_NO_SUCH_NAME = "the network has no endpoint or alias of this name"
_NO_SUCH_TYPE = "the name exists, without a record of this type"
_NO_SUCH_NETWORK = f"the asker is in no network of this name, and {ZONE} is ours alone"
_NO_SUCH_ADDRESS = "the address is within our subnets, but no endpoint that the asker sees has it"
_TOO_DEEP = "the network has no names below those of its endpoints"
_SINGLE = "a single label that no network of the asker knows; such names are never forwarded"
_LOCALHOST = "localhost is always the asker itself (RFC 6761)"
_OUTSIDE = "the name is not ours, so the host's resolvers are asked"
_INTERNAL = "the name is not ours, and the asker is in internal networks only: no way out"
_STRANGER = "the name is not ours, and only sandboxes of this node may ask for such names"


def subject_of(labels: Sequence[str]) -> int:
    """Where in a name the endpoint's or service's own one is: behind tasks and _PORT._tcp."""
    if len(labels) > 1 and labels[0] == TASKS:
        return 1
    if len(labels) > 2 and labels[0].startswith("_") and labels[1] in ("_tcp", "_udp"):
        return 2
    return 0


def _record(address: bytes) -> Record:
    return Record(A if len(address) == 4 else AAAA, address)


def _turned(found: list[Record], turn: int) -> tuple[Record, ...]:
    first = turn % len(found)
    return tuple(found[first:] + found[:first])


def _addresses(
    addresses: Iterable[bytes], type: int, zone: str, turn: int, network: str, why: str
) -> Answer:
    found = [_record(address) for address in dict.fromkeys(addresses)]
    if type != ANY:
        found = [record for record in found if record.type == type]
    if not found:
        return Answer(Kind.NODATA, _NO_SUCH_TYPE, zone=zone, network=network)
    return Answer(Kind.ANSWER, why, _turned(found, turn), zone, network)


def _localhost(question: Question) -> Answer:
    types = (A, AAAA) if question.type == ANY else (question.type,)
    records = tuple(Record(type, _LOOPBACK[type]) for type in types if type in _LOOPBACK)
    kind = Kind.ANSWER if records else Kind.NODATA
    return Answer(kind, _LOCALHOST, records, "localhost")
