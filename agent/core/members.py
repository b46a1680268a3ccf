"""The endpoints of one network, wherever they live, found by id, MAC, address or name.

Two endpoints can claim one MAC or address for a while (two halves of a cluster that could not
see each other); both are kept, and everyone picks the same one: one on a node that counts as
there, the local one where there is one, else the smallest id.
What stands opposite: drivers/overlay.py makes rows of it.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Sequence, Set
from typing import Generic, TypeVar

import msgspec

from agent.errors import Invalid
from agent.model import Endpoint

K = TypeVar("K", bound=Hashable)
# Endpoints of a network with one name, MAC or address. Of those all are looked at to choose one,
# so without a bound the cost were their square; halves of a cluster bring two, rarely a few.
CLAIMANTS_MAX = 100


# Structs: there are 100,000 of them, and they are made in a third of the time of NamedTuples and
# no garbage collection looks at them.
class Member(msgspec.Struct, frozen=True, gc=False):
    """An endpoint and the node that it lives on."""

    endpoint: Endpoint
    node: str


class EndpointChange(msgspec.Struct, frozen=True, gc=False):
    """An endpoint before and after; None where there was or is none."""

    network: str
    old: Member | None
    new: Member | None


class _Index(Generic[K]):
    """key -> ids. Nearly every key has one id, so only the others pay for a list."""

    __slots__ = ("_more", "one")

    def __init__(self) -> None:
        self.one: dict[K, str] = {}  # the first
        self._more: dict[K, dict[str, None]] = {}  # an ordered set: a key may have many

    def add(self, key: K, id: str) -> None:
        if self.one.setdefault(key, id) is not id and self.one[key] != id:
            self._more.setdefault(key, {})[id] = None

    def remove(self, key: K, id: str) -> None:
        rest = self._more.get(key)
        if self.one.get(key) == id:
            if rest:
                self.one[key] = next(iter(rest))
                del rest[self.one[key]]
            else:
                del self.one[key]
        elif rest:
            rest.pop(id, None)
        if rest is not None and not rest:
            del self._more[key]

    def ids(self, key: K) -> list[str]:
        first = self.one.get(key)
        if first is None:
            return []
        return [first, *self._more[key]] if key in self._more else [first]

    def count(self, key: K) -> int:
        """How many ids have the key."""
        return (key in self.one) + len(self._more.get(key, ()))

    def sole(self, key: K) -> str | None:
        """The id of a key that has just one; None if it has none, or several."""
        return None if self._more and key in self._more else self.one.get(key)

    def other(self, key: K, than: tuple[str | None, ...]) -> bool:
        """Whether an id that is not in `than` has the key."""
        return self.one.get(key) not in than or bool(self._more and key in self._more)

    @property
    def is_shared(self) -> bool:
        """Whether any key has several ids."""
        return bool(self._more)

    def keys(self) -> Collection[K]:
        return self.one.keys()

    def __contains__(self, key: object) -> bool:
        return key in self.one


class Members:
    """The index. `me` is this node's id; `withdrawn` the nodes whose endpoints count as gone,
    shared with its owner, who changes it."""

    def __init__(self, me: str, withdrawn: Set[str] = frozenset()) -> None:
        self.me = me
        self.withdrawn = withdrawn
        self.all: dict[str, Member] = {}
        self.local: dict[str, Endpoint] = {}
        self.count: dict[str, int] = {}  # node -> endpoints
        self.by_mac: _Index[bytes] = _Index()
        self.by_address: _Index[bytes] = _Index()
        self.by_name: _Index[str] = _Index()

    def put(self, endpoint: Endpoint, node: str) -> Member | None:
        """Add or replace; what was there before under that id."""
        id = endpoint.id
        old = self.drop(id) if id in self.all else None
        self.all[id] = Member(endpoint, node)
        self.count[node] = self.count.get(node, 0) + 1
        if node == self.me:
            self.local[id] = endpoint
        self.by_mac.add(endpoint.mac, id)
        self.by_name.add(endpoint.name, id)
        for address in endpoint.addresses:
            self.by_address.add(address, id)
        return old

    def put_fresh(self, endpoints: Sequence[Endpoint], node: str) -> list[Member] | None:
        """Add endpoints of which nothing is known here, all or none: None if an id, MAC, name
        or address is, or two of them share one.

        For a bulk: a fifth of what `put` costs for each.
        """
        members = [Member(endpoint, node) for endpoint in endpoints]
        fresh = {endpoint.id: member for endpoint, member in zip(endpoints, members, strict=True)}
        macs = {endpoint.mac: endpoint.id for endpoint in endpoints}
        names = {endpoint.name: endpoint.id for endpoint in endpoints}
        held = [(a, endpoint.id) for endpoint in endpoints for a in endpoint.addresses]
        addresses = dict(held)
        if (
            not len(fresh) == len(macs) == len(names) == len(members)
            or len(addresses) < len(held)
            or not self.all.keys().isdisjoint(fresh)
            or not self.by_mac.one.keys().isdisjoint(macs)
            or not self.by_name.one.keys().isdisjoint(names)
            or not self.by_address.one.keys().isdisjoint(addresses)
        ):
            return None
        self.all.update(fresh)
        self.count[node] = self.count.get(node, 0) + len(members)
        if node == self.me:
            self.local.update({endpoint.id: endpoint for endpoint in endpoints})
        self.by_mac.one.update(macs)
        self.by_name.one.update(names)
        self.by_address.one.update(addresses)
        return members

    def check_claims(self, endpoint: Endpoint) -> None:
        """Invalid if too many endpoints claim what this one claims as well."""
        shared = self.by_mac.is_shared or self.by_name.is_shared or self.by_address.is_shared
        if not shared or endpoint.id in self.all:
            return
        most = max(self.by_mac.count(endpoint.mac), self.by_name.count(endpoint.name))
        for address in endpoint.addresses:
            most = max(most, self.by_address.count(address))
        if most >= CLAIMANTS_MAX:
            raise Invalid("endpoint", f"claims what {most} others claim")

    def drop(self, id: str) -> Member | None:
        """Remove; what was there."""
        member = self.all.pop(id, None)
        if member is None:
            return None
        self.local.pop(id, None)
        self.count[member.node] -= 1
        endpoint = member.endpoint
        self.by_mac.remove(endpoint.mac, id)
        self.by_name.remove(endpoint.name, id)
        for address in endpoint.addresses:
            self.by_address.remove(address, id)
        return member

    def with_mac(self, mac: bytes) -> Member | None:
        """The endpoint that this node believes has `mac`."""
        sole = self.by_mac.sole(mac)
        return self.all[sole] if sole is not None else self._choose(self.by_mac.ids(mac))

    def with_address(self, address: bytes) -> Member | None:
        """The endpoint that this node believes has `address`."""
        sole = self.by_address.sole(address)
        return self.all[sole] if sole is not None else self._choose(self.by_address.ids(address))

    def with_macs(self, macs: Iterable[bytes]) -> list[Member | None]:
        """`with_mac` of each."""
        return self._with_each(self.by_mac, macs)

    def with_addresses(self, addresses: Iterable[bytes]) -> list[Member | None]:
        """`with_address` of each."""
        return self._with_each(self.by_address, addresses)

    def with_name(self, name: str) -> list[Member]:
        """Those that bear `name` itself, not as an alias."""
        return [self.all[id] for id in self.by_name.ids(name)]

    def contested(self, endpoint: Endpoint) -> bool:
        """Whether another endpoint claims its MAC or one of its addresses."""
        own = (None, endpoint.id)
        return self.by_mac.other(endpoint.mac, own) or any(
            self.by_address.other(address, own) for address in endpoint.addresses
        )

    @property
    def is_contested(self) -> bool:
        """Whether any MAC or address is claimed by two."""
        return self.by_mac.is_shared or self.by_address.is_shared

    def _with_each(self, index: _Index[bytes], keys: Iterable[bytes]) -> list[Member | None]:
        one, get = index.one.get, self.all.get
        if not index.is_shared:
            return [get(one(key, "")) for key in keys]
        return [self._choose(index.ids(key)) for key in keys]

    def _choose(self, ids: list[str]) -> Member | None:
        if not ids:
            return None
        gone = self.withdrawn
        return self.all[
            min(ids, key=lambda id: (self.all[id].node in gone, id not in self.local, id))
        ]
