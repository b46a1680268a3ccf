"""Names of endpoints by network, and the answer to a question by who asks.

A sandbox asks, and its address says which networks it is in: its view. It sees the names of
those networks only: NAME, NAME.NET and NAME.NET.vxmesh.internal, aliases as well as names, and
the way back from an address. What is ours is answered with authority, the answer "no such
name" included, and never leaves: everything under vxmesh.internal, under the name of a network
of the view, single labels, and addresses within our subnets. All else is for the host's
resolvers, if a network of the view leads out at all.

The price: in the sandboxes of a network called `dev`, names under the public top-level domain
`dev` cannot be resolved.

Sources: RFC 1034 and 1035, 2308 (negative answers), 6761 (localhost), 8020 (a name that is
denied has nothing below it, so what lies between exists), 8482 (ANY).
What stands opposite: agent/resolver, which puts this on the wire.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple

from agent.core.question import AAAA, ANY, PTR, SOA, A, Question, ReversePrefix, reverse_prefix
from agent.model import format_address

ZONE = "vxmesh.internal"
TTL = 5  # seconds, of every record of ours and of "no such name"

_ZONE_LABELS = ("vxmesh", "internal")
# Endpoints of one name that an answer is made of: some 12 ms of work over TCP; over UDP some 70 fit
# in any case. Without it each question for a name that thousands share would hold up all others.
HOLDERS_MAX = 256
_SEARCH_BYTES_MAX = 240  # musl skips a line of resolv.conf of 256 bytes or more
_SEARCH_DOMAINS_MAX = 6  # glibc before 2.26 takes no more
_NAMESERVERS_MAX = 3  # glibc and musl take no more


class Kind(Enum):
    """What is to be done with a question."""

    ANSWER = "answer"
    NODATA = "nodata"  # the name exists, with records of other types
    NXDOMAIN = "nxdomain"
    FORWARD = "forward"
    REFUSED = "refused"  # not ours, and the asker has no way out


class Record(NamedTuple):
    """One record of the name that was asked; its TTL is `TTL`.

    `data` is an address (4 or 16 bytes) for A and AAAA, a name without its final dot for PTR.
    For SOA it is empty: the zone is that of the answer.
    """

    type: int
    data: bytes | str


class Answer(NamedTuple):
    """What to say. `zone` (no final dot; "" is the root) owns the SOA of a negative answer."""

    kind: Kind
    why: str
    records: tuple[Record, ...] = ()
    zone: str = ""
    network: str = ""  # id of the network that has the name


View = tuple[str, ...]
_Entry = tuple[str, tuple[str, ...], tuple[bytes, ...]]  # name, aliases, addresses
_LOOPBACK = {A: bytes((127, 0, 0, 1)), AAAA: bytes(15) + b"\1"}


class _Network:
    __slots__ = ("addresses", "endpoints", "internal", "name", "names", "subnets")

    def __init__(self) -> None:
        self.name = ""
        self.internal = False
        self.subnets: list[tuple[int, int, int]] = []  # version, prefix length, base
        self.endpoints: dict[str, _Entry] = {}
        # Nearly every name is one endpoint's: a list for each would cost 100 bytes a name.
        self.names: dict[str, str | list[str]] = {}  # sorted, where they are several
        self.addresses: dict[bytes, str] = {}

    def holders(self, name: str, turn: int = 0) -> list[str]:
        """Endpoint ids that bear the name, in an order that is the same on every node. Of very
        many some, others at each `turn`."""
        held = self.names.get(name)
        if held is None:
            return []
        if isinstance(held, str):
            return [held]
        if len(held) <= HOLDERS_MAX:
            return held
        first = turn * HOLDERS_MAX % len(held)
        found = held[first : first + HOLDERS_MAX]
        return found + held[: HOLDERS_MAX - len(found)]

    def take(self, name: str, id: str) -> None:
        held = self.names.setdefault(name, id)
        if isinstance(held, str):
            if held != id:
                self.names[name] = sorted((held, id))
        elif (place := bisect_left(held, id)) == len(held) or held[place] != id:
            held.insert(place, id)

    def forget(self, id: str, entry: _Entry) -> None:
        name, aliases, addresses = entry
        for each in (name, *aliases):
            held = self.names.get(each)
            if held == id:
                del self.names[each]
            elif isinstance(held, list):
                place = bisect_left(held, id)
                if place < len(held) and held[place] == id:
                    del held[place]
                if len(held) == 1:
                    self.names[each] = held[0]
        for address in addresses:
            if self.addresses.get(address) == id:
                del self.addresses[address]


class Names:
    """All names that this node's sandboxes may ask for, changed one by one.

    Names and aliases are DNS labels (agent.model.parse_name). Order does not matter: an
    endpoint may come before its network, a view before both.
    """

    def __init__(self) -> None:
        self._networks: dict[str, _Network] = {}
        self._views: dict[bytes, View] = {}
        # version, prefix length -> base -> ids: of networks that share a subnet there are several
        self._subnets: dict[tuple[int, int], dict[int, list[str]]] = {}

    def put_network(
        self, id: str, name: str, subnets: Iterable[str] = (), internal: bool = False
    ) -> None:
        """A network or what changed of it. `subnets` in CIDR; `internal`: no way out of it."""
        network = self._networks.setdefault(id, _Network())
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
        network = self._networks.pop(id, None)
        if network is not None:
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
        network = self._networks.get(network_id)
        if network is None:
            network = self._networks[network_id] = _Network()
        lowered = tuple([alias.lower() for alias in aliases]) if aliases else ()
        entry = (name.lower(), lowered, addresses)
        old = network.endpoints.get(endpoint_id)
        if old is not None:
            if old == entry:
                return
            network.forget(endpoint_id, old)
        network.endpoints[endpoint_id] = entry
        network.take(entry[0], endpoint_id)
        for alias in lowered:
            network.take(alias, endpoint_id)
        for address in addresses:
            network.addresses[address] = endpoint_id

    def drop(self, network_id: str, endpoint_id: str) -> None:
        """The endpoint is gone. Nothing happens if there is none."""
        network = self._networks.get(network_id)
        if network is None:
            return
        entry = network.endpoints.pop(endpoint_id, None)
        if entry is not None:
            network.forget(endpoint_id, entry)
        if not network.endpoints and not network.name:
            del self._networks[network_id]

    def put_view(self, address: bytes, networks: View) -> None:
        """Who asks from `address` (4 or 16 bytes) is in these networks; the first counts first."""
        self._views[address] = networks

    def drop_view(self, address: bytes) -> None:
        """Nobody of ours has that address any more."""
        self._views.pop(address, None)

    def view(self, address: bytes) -> View:
        """Network ids of who asks from `address`; empty for a stranger."""
        return self._views.get(address, ())

    def counts(self) -> dict[str, int]:
        """How many networks, endpoints and views are known."""
        return {
            "networks": len(self._networks),
            "endpoints": sum(len(n.endpoints) for n in self._networks.values()),
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
            network = self._networks.get(id)
            if network is not None and network.name == last:
                if len(labels) > 2:
                    return Answer(Kind.NXDOMAIN, _TOO_DEEP, zone=last, network=id)
                return self._in_network(id, labels[0], question.type, last, turn)
        return self._outside(view)

    def explain(self, question: Question, view: View) -> list[str]:
        """Why `question` gets the answer that it gets, a sentence a line, for an operator.

        Says more than the asker may know, such as that another network has the name.
        """
        answer = self.answer(question, view)
        if view:
            lines = [f"the asker is in {', '.join(self._title(id) for id in view)}"]
        else:
            lines = ["the asker has no address of a sandbox of this node, so it is in no network"]
        lines.append(answer.why)
        network = self._networks.get(answer.network)
        if answer.kind is Kind.ANSWER and network is not None:
            for id in self._meant(network, question):
                name, aliases, addresses = network.endpoints[id]
                also = f" (also {', '.join(aliases)})" if aliases else ""
                has = ", ".join(format_address(address) for address in addresses)
                lines.append(f"endpoint {id} in {self._title(answer.network)}: {name}{also}, {has}")
        if answer.kind is not Kind.ANSWER and question.labels:
            lines.extend(
                f"{self._title(id)} has the name {question.labels[0]}, but the asker is not in it"
                for id, other in self._networks.items()
                if id not in view and question.labels[0] in other.names
            )
        return lines

    def _in_zone(self, question: Question, view: View, turn: int) -> Answer:
        above = question.labels[:-2]
        if not above:
            if question.type in (SOA, ANY):
                return Answer(Kind.ANSWER, _APEX, (Record(SOA, ""),), ZONE)
            return Answer(Kind.NODATA, _APEX, zone=ZONE)
        for id in view:
            network = self._networks.get(id)
            if network is not None and network.name == above[-1]:
                if len(above) == 1:
                    return Answer(Kind.NODATA, _NETWORK, zone=ZONE, network=id)
                if len(above) > 2:
                    return Answer(Kind.NXDOMAIN, _TOO_DEEP, zone=ZONE, network=id)
                return self._in_network(id, above[0], question.type, ZONE, turn)
        return Answer(Kind.NXDOMAIN, _NO_SUCH_NETWORK, zone=ZONE)

    def _single(self, question: Question, view: View, turn: int) -> Answer:
        label = question.labels[0]
        between = label == _ZONE_LABELS[-1]
        for id in view:
            network = self._networks.get(id)
            if network is None:
                continue
            if label in network.names:
                return self._in_network(id, label, question.type, label, turn)
            between = between or network.name == label
        if between:
            return Answer(Kind.NODATA, _NETWORK, zone=label)
        return Answer(Kind.NXDOMAIN, _SINGLE)

    def _in_network(self, id: str, name: str, type: int, zone: str, turn: int) -> Answer:
        network = self._networks[id]
        holders = network.holders(name, turn)
        if not holders:
            return Answer(Kind.NXDOMAIN, _NO_SUCH_NAME, zone=zone, network=id)
        found = [
            Record(A if len(address) == 4 else AAAA, address)
            for address in dict.fromkeys(
                address for holder in holders for address in network.endpoints[holder][2]
            )
        ]
        if type != ANY:
            found = [record for record in found if record.type == type]
        if not found:
            return Answer(Kind.NODATA, _NO_SUCH_TYPE, zone=zone, network=id)
        first = turn % len(found)
        return Answer(Kind.ANSWER, _NAME, tuple(found[first:] + found[:first]), zone, id)

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
            network = self._networks.get(id)
            holder = network.addresses.get(address) if network is not None else None
            if network is None or holder is None:
                continue
            if question.type not in (PTR, ANY):
                return Answer(Kind.NODATA, _NO_SUCH_TYPE, zone=zone, network=id)
            parts = (network.endpoints[holder][0], network.name, ZONE)
            record = Record(PTR, ".".join(part for part in parts if part))
            return Answer(Kind.ANSWER, _ADDRESS, (record,), zone, id)
        return Answer(Kind.NXDOMAIN, _NO_SUCH_ADDRESS, zone=zone)

    def _covered(self, version: int, value: int, bits: int) -> int:
        """The prefix length of a network's subnet that a prefix lies in; 0 if in none."""
        for (of, prefix), bases in self._subnets.items():
            if of == version and prefix <= bits and value >> (bits - prefix) in bases:
                return prefix
        return 0

    def _outside(self, view: View) -> Answer:
        networks = [self._networks[id] for id in view if id in self._networks]
        if any(not network.internal for network in networks):
            return Answer(Kind.FORWARD, _OUTSIDE)
        return Answer(Kind.REFUSED, _INTERNAL if networks else _STRANGER)

    def _forget_subnets(self, id: str, network: _Network) -> None:
        for version, prefix, base in network.subnets:
            bases = self._subnets[version, prefix]
            bases[base].remove(id)
            if not bases[base]:
                del bases[base]
            if not bases:
                del self._subnets[version, prefix]
        network.subnets = []

    def _meant(self, network: _Network, question: Question) -> list[str]:
        prefix = reverse_prefix(question.labels)
        if prefix is None or prefix.address is None:
            return network.holders(question.labels[0])
        return [network.addresses[prefix.address]]

    def _title(self, id: str) -> str:
        network = self._networks.get(id)
        return (
            f"network {network.name}" if network is not None and network.name else f"network {id}"
        )


_NAME = "the network has this name"
_ADDRESS = "an endpoint of a network of the asker has this address"
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


def _localhost(question: Question) -> Answer:
    types = (A, AAAA) if question.type == ANY else (question.type,)
    records = tuple(Record(type, _LOOPBACK[type]) for type in types if type in _LOOPBACK)
    kind = Kind.ANSWER if records else Kind.NODATA
    return Answer(kind, _LOCALHOST, records, "localhost")


def resolv_conf(nameservers: Sequence[str], networks: Sequence[str]) -> str:
    """The text of a sandbox's resolv.conf: gateways to ask, names of its networks in order.

    `ndots:0`: both glibc and musl ask for `two` and `two.demo` as they stand, which we answer,
    one question a look-up. The search list is for those that never send a single label, such as
    systemd-resolved, and makes NAME.NET.vxmesh.internal of it; a list longer than a C library
    takes loses its last ones.
    """
    lines = [f"nameserver {address}" for address in nameservers[:_NAMESERVERS_MAX]]
    search = ""
    for network in networks[:_SEARCH_DOMAINS_MAX]:
        longer = f"{search} {network}.{ZONE}"
        if len(longer) > _SEARCH_BYTES_MAX:
            break
        search = longer
    if search:
        lines.append(f"search{search}")
    lines.append("options ndots:0")
    return "\n".join(lines) + "\n"
