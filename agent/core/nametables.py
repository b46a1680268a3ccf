"""What one network of names holds: its endpoints and services, by name and by address. Pure.

An endpoint bears its name and its aliases, of which several may bear the same one; a service has
one name, which hides endpoints of that name, and its backends are endpoints of its network. A
backend that is unknown here (its node is gone, or it is yet to come) is in no answer, so whoever
lists one need not follow it.
What stands opposite: names.py, which answers questions out of this.
Sources: RFC 2782 (SRV).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple, TypeVar

# Endpoints of one name that an answer is made of: some 12 ms of work over TCP; over UDP some 70 fit
# in any case. Without it each question for a name that thousands share would hold up all others.
HOLDERS_MAX = 256
_DEPARTED_MAX = 10_000

T = TypeVar("T")

Entry = tuple[str, tuple[str, ...], tuple[bytes, ...]]  # name, aliases, addresses


class ServicePort(NamedTuple):
    """A port of a service: clients of the VIP use `port`, the backends listen on `target`.

    `protocol` is "tcp" or "udp"; `name`, if not empty, is what `_NAME._tcp` may call it by, as
    well as its number.
    """

    protocol: str
    port: int
    target: int
    name: str = ""


class ServiceBackend(NamedTuple):
    """An endpoint (id, of the service's network) that takes connections; the weight is SRV's."""

    endpoint: str
    weight: int = 1


class ServiceEntry(NamedTuple):
    """All that is answered about a service. Without VIPs its name leads to the backends."""

    name: str
    vips: tuple[bytes, ...]
    backends: tuple[ServiceBackend, ...]
    ports: tuple[ServicePort, ...]

    def find_ports(self, protocol: str, label: str) -> list[ServicePort]:
        """The ports that `_LABEL._PROTOCOL` means: by number, or by name."""
        return [
            port
            for port in self.ports
            if port.protocol == protocol and label in (str(port.port), port.name.lower())
        ]


class NetworkNames:
    """The names of one network. All are lower case."""

    __slots__ = (
        "addresses",
        "backing",
        "departed",
        "endpoints",
        "internal",
        "name",
        "named",
        "names",
        "services",
        "stale",
        "subnets",
        "vips",
    )  # fmt: skip

    def __init__(self, stale: set[str | bytes] | None = None) -> None:
        """`stale`: where to note names and addresses whose answers change; None: nobody asks."""
        self.stale = stale
        self.name = ""
        self.internal = False
        self.subnets: list[tuple[int, int, int]] = []  # version, prefix length, base
        self.endpoints: dict[str, Entry] = {}
        # Nearly every name is one endpoint's: a list for each would cost 100 bytes a name.
        self.names: dict[str, str | list[str]] = {}  # sorted, where they are several
        self.addresses: dict[bytes, str] = {}
        self.services: dict[str, ServiceEntry] = {}  # by id
        self.named: dict[str, list[str]] = {}  # service ids by name, sorted: the first counts
        self.vips: dict[bytes, str] = {}
        self.backing: dict[str, set[str]] = {}  # endpoint id -> services that list it
        # Services that were: `tasks.NAME` of one is not to leave the host because it is gone.
        self.departed: dict[str, None] = {}

    def __bool__(self) -> bool:
        return bool(self.endpoints or self.services or self.name)

    def __contains__(self, name: str) -> bool:
        return name in self.names or name in self.named

    def service(self, name: str) -> ServiceEntry | None:
        """The service of that name."""
        ids = self.named.get(name)
        return self.services[ids[0]] if ids else None

    def bearer(self, address: bytes) -> str:
        """The name of the service or endpoint that has the address; empty if none."""
        if (service := self.vips.get(address)) is not None:
            return self.services[service].name
        holder = self.addresses.get(address)
        return self.endpoints[holder][0] if holder is not None else ""

    def holders(self, name: str, turn: int = 0) -> list[str]:
        """Endpoint ids that bear the name, in an order that is the same on every node. Of very
        many some, others at each `turn`."""
        held = self.names.get(name)
        if held is None:
            return []
        if isinstance(held, str):
            return [held]
        return some_of(held, turn)

    def backends(self, service: ServiceEntry, turn: int = 0) -> list[tuple[ServiceBackend, Entry]]:
        """Backends that are known, with what is known of them; of very many some."""
        known = self.endpoints
        held = [(b, known[b.endpoint]) for b in service.backends if b.endpoint in known]
        return some_of(held, turn)

    def put(self, id: str, entry: Entry) -> None:
        """An endpoint or what changed of it. Of two with one address the later put has it."""
        old = self.endpoints.get(id)
        if old == entry:
            return
        if old is not None:
            self._forget(id, old)
        self.endpoints[id] = entry
        name, aliases, addresses = entry
        self._take(name, id)
        for alias in aliases:
            self._take(alias, id)
        for address in addresses:
            self.addresses[address] = id
        if self.stale is not None:
            self._touch_endpoint(id, entry, self.stale)

    def drop(self, id: str) -> None:
        """The endpoint is gone. Nothing happens if there is none."""
        entry = self.endpoints.pop(id, None)
        if entry is not None:
            self._forget(id, entry)

    def put_service(self, id: str, entry: ServiceEntry) -> None:
        """A service or what changed of it."""
        old = self.services.get(id)
        if old == entry:
            return
        if old is not None:
            self.drop_service(id)
        self.services[id] = entry
        self.named[entry.name] = sorted((*self.named.get(entry.name, ()), id))
        for vip in entry.vips:
            self.vips[vip] = id
        for backend in entry.backends:
            self.backing.setdefault(backend.endpoint, set()).add(id)
        if self.stale is not None:
            self.stale.update((entry.name, *entry.vips))

    def drop_service(self, id: str) -> None:
        """The service is gone. Nothing happens if there is none."""
        entry = self.services.pop(id, None)
        if entry is None:
            return
        self.named[entry.name].remove(id)
        if not self.named[entry.name]:
            del self.named[entry.name]
        if len(self.departed) >= _DEPARTED_MAX:
            del self.departed[next(iter(self.departed))]
        self.departed[entry.name] = None
        for vip in entry.vips:
            if self.vips.get(vip) == id:
                del self.vips[vip]
        for backend in entry.backends:
            if services := self.backing.get(backend.endpoint):
                services.discard(id)
                if not services:
                    del self.backing[backend.endpoint]
        if self.stale is not None:
            self.stale.update((entry.name, *entry.vips))

    def _touch_endpoint(self, id: str, entry: Entry, stale: set[str | bytes]) -> None:
        name, aliases, addresses = entry
        stale.add(name)
        stale.update(aliases)
        stale.update(addresses)
        for service in self.backing.get(id, ()):
            stale.add(self.services[service].name)

    def _take(self, name: str, id: str) -> None:
        held = self.names.setdefault(name, id)
        if isinstance(held, str):
            if held != id:
                self.names[name] = sorted((held, id))
        elif (place := bisect_left(held, id)) == len(held) or held[place] != id:
            held.insert(place, id)

    def _forget(self, id: str, entry: Entry) -> None:
        if self.stale is not None:
            self._touch_endpoint(id, entry, self.stale)
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


def some_of(held: list[T], turn: int) -> list[T]:
    """All, or HOLDERS_MAX of them: at the next `turn` the next ones."""
    if len(held) <= HOLDERS_MAX:
        return held
    first = turn * HOLDERS_MAX % len(held)
    found = held[first : first + HOLDERS_MAX]
    return found + held[: HOLDERS_MAX - len(found)]
