"""The services of the cluster, which any node may write, as one view that all nodes share. PURE.

As core/catalogue.py has networks: of what two services claim, made where their makers could not
see each other, the older one (core/judging.py) has it, and the other one goes on without:

* its name, in its network: it is shown as NAME-<6 of its id>, and that lasts;
* a published port, where both publish it: the younger one does not, until the older one goes;
* a virtual address, which only a broken or hostile node gives twice.

What stands opposite: agent/node/services.py writes the records; core/services.py says where each
service leads.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple, TypeVar

import msgspec

from agent.core.judging import Age, Claimants, Written, age
from agent.model import Loss
from agent.notation import format_address
from agent.servicemodel import Port, Service

K = TypeVar("K", bound=Hashable)
# Services with a record of one node. Each change of one is judged beside all conflicts there are.
SERVICES_MAX = 5000
NAME_MAX = 63  # of a DNS label
ID_PIECES = (6, 8, 10, 12, 14, 16)  # how much of the id a loser's name has: the first is enough


class ServiceConflict(NamedTuple):
    """Service `loser` does without `value`, which the older `winner` has."""

    loser: str
    winner: str
    what: str  # name, port or address
    value: str


def meet(one: Service, port: Port, other: Service, theirs: Port) -> bool:
    """Whether two published ports would be the same one on some node."""
    if (port.protocol, port.published) != (theirs.protocol, theirs.published):
        return False
    nodes, others = set(one.publish_on), set(other.publish_on)
    if nodes and others and not nodes & others:
        return False
    at = {port.published_at, theirs.published_at}
    return len(at) == 1 or "" in at


class ServiceCatalogue:
    """Every origin's service records, and the view that follows from them."""

    def __init__(self) -> None:
        self._written: Written[Service] = Written()
        self._best: dict[str, Service] = {}  # as written: the records that count
        self._services: dict[str, Service] = {}  # as judged
        self._ids: dict[tuple[str, str], str] = {}  # network, name as judged -> id
        self._of: dict[str, dict[str, None]] = {}  # network -> ids, as written
        self._names: Claimants[tuple[str, str]] = Claimants()
        self._vips: Claimants[tuple[str, bytes]] = Claimants()
        self._ports: dict[tuple[str, int], dict[str, None]] = {}  # protocol, port -> ids
        self._shared: set[tuple[str, int]] = set()  # those of _ports with several ids
        self._clashes: dict[str, list[ServiceConflict]] = {}  # loser -> what it does without
        self._losers: dict[str, Service] = {}  # those judged otherwise than written, as judged
        self._moved: set[str] = set()  # ids whose record that counts changed since judged
        self._is_held = False

    # -- what there is --

    def get(self, id: str) -> Service | None:
        """A living service by its whole id, with what it has."""
        return self._services.get(id)

    def written(self, id: str) -> Service | None:
        """The same as its record says, before it was judged beside the others."""
        return self._best.get(id)

    def named(self, network: str, name: str) -> Service | None:
        """The living service of a network (id) by its name."""
        id = self._ids.get((network, name))
        return self._services[id] if id else None

    def with_address(self, network: str, address: bytes) -> Service | None:
        """The service that has a virtual address in a network."""
        if (network, address) not in self._vips:
            return None
        return self._services.get(self._vips.holder((network, address)))

    def all(self) -> Iterable[Service]:
        """The living services."""
        return self._services.values()

    def of(self, network: str) -> list[Service]:
        """The living services of a network (id)."""
        # What is held back is not among them yet.
        return [self._services[id] for id in self._of.get(network, ()) if id in self._services]

    def publishing(self, protocol: str, published: int) -> list[Service]:
        """The services whose records publish a port, wherever."""
        ids = self._ports.get((protocol, published), ())
        return [self._services[id] for id in ids if id in self._services]

    def writers(self, id: str) -> set[str]:
        """The origins that have a record about this service."""
        return set(self._written.records(id))

    def records(self, id: str) -> dict[str, Service]:
        """Origin -> its record about this service, dead or alive."""
        return self._written.records(id)

    def has_room(self, origin: str, service: Service | None = None) -> bool:
        """Whether `origin` may have a record about a service (a new one: None) besides those
        that it has. It may delete as many as it likes."""
        if self._written.count(origin) < SERVICES_MAX or (service and service.deleted):
            return True
        own = self._written.records(service.id).get(origin) if service else None
        return own is not None and not own.deleted

    # -- conflicts --

    def conflicts(self) -> set[ServiceConflict]:
        """Those that stand: between services that are both there."""
        found = {conflict for id in self._clashes for conflict in self.conflicts_of(id)}
        for service in self._services.values() if self._any_lost() else ():
            found.update(self.conflicts_of(service.id))
        return found

    def conflicts_of(self, id: str) -> list[ServiceConflict]:
        """Those that one service lost, sorted."""
        service = self._services.get(id)
        found = set(self._clashes.get(id, ()))
        for loss in service.lost if service else ():
            if loss.winner in self._services:
                found.add(ServiceConflict(id, loss.winner, loss.what, loss.value))
        return sorted(found)

    def unsettled(self) -> Iterator[Service]:
        """The services whose record does not yet say that they have another name; as written,
        but for that name."""
        for id in sorted(self._losers):
            written, judged = self._best[id], self._losers[id]
            if written.name != judged.name:
                yield msgspec.structs.replace(written, name=judged.name, lost=judged.lost)

    def _any_lost(self) -> bool:
        return any(service.lost for service in self._services.values())

    # -- how records become the view --

    def put(self, origin: str, service: Service) -> dict[str, Service | None]:
        """Take a record; the services that look different now, each as it was before."""
        self._written.put(origin, service)
        return self._judge(service.id)

    def drop(self, origin: str, id: str) -> dict[str, Service | None]:
        """An origin withdrew its record; as for `put`."""
        self._written.drop(origin, id)
        return self._judge(id)

    def hold(self) -> None:
        """Take records from now on without a look at the others, until `release`."""
        self._is_held = True

    def release(self) -> dict[str, Service | None]:
        """Judge what was taken since `hold`; the services that look different now, as `put`."""
        self._is_held = False
        if not self._moved:
            return {}
        moved, self._moved = self._moved, set()
        losers = self._settle()
        before: dict[str, Service | None] = {}
        after: dict[str, Service] = {}
        for each in moved | self._losers.keys() | losers.keys():
            was, now = self._services.get(each), losers.get(each) or self._best.get(each)
            if was != now:
                before[each] = was
                if now:
                    after[each] = now
        self._losers = losers
        for each, was in before.items():
            self._services.pop(each, None)
            if was and self._ids.get((was.network, was.name)) == each:
                del self._ids[was.network, was.name]
        for each, now in after.items():
            self._services[each] = now
            self._ids[now.network, now.name] = each
        return before

    def _judge(self, id: str) -> dict[str, Service | None]:
        old, new = self._best.get(id), self._written.best(id)
        if old != new:
            if old:
                self._withdraw(old)
            if new:
                self._enter(new)
            self._moved.add(id)
        return {} if self._is_held else self.release()

    def _enter(self, service: Service) -> None:
        id, claim = service.id, age(service)
        self._best[id] = service
        self._of.setdefault(service.network, {})[id] = None
        self._names.add((service.network, service.name), claim)
        for vip in service.vips:
            self._vips.add((service.network, vip), claim)
        for port in service.published:
            key = port.protocol, port.published
            held = self._ports.setdefault(key, {})
            held[id] = None
            if len(held) > 1:
                self._shared.add(key)

    def _withdraw(self, service: Service) -> None:
        id, claim = service.id, age(service)
        del self._best[id]
        _discard(self._of, service.network, id)
        self._names.discard((service.network, service.name), claim)
        for vip in service.vips:
            self._vips.discard((service.network, vip), claim)
        for key in {(port.protocol, port.published) for port in service.published}:
            _discard(self._ports, key, id)
            if len(self._ports.get(key, ())) < 2:
                self._shared.discard(key)

    def _settle(self) -> dict[str, Service]:
        """Those that cannot have what their record says, each as it is instead.

        All of them anew, the oldest first: so the order in which records came leaves no trace.
        """
        names = dict(self._names.losers())
        lost_vips: dict[str, list[tuple[str, bytes]]] = {}
        for (_, id), key in self._vips.losers():
            lost_vips.setdefault(id, []).append(key)
        lost_ports = self._lost_ports()
        self._clashes = {}
        given: set[tuple[str, str]] = set()
        losers: dict[str, Service] = {}
        ids = {id for _, id in names} | lost_vips.keys() | lost_ports.keys()
        for loser in sorted(age(self._best[id]) for id in ids):
            service = self._best[loser[1]]
            clashes = self._clashes[service.id] = []
            if loser in names:
                winner = self._names.holder(names[loser])
                name = self._free_name(loser, service, given)
                given.add((service.network, name))
                lost = (Loss("name", service.name, winner),)
                service = msgspec.structs.replace(service, name=name, lost=lost)
            for network, vip in lost_vips.get(service.id, ()):
                winner = self._vips.holder((network, vip))
                clashes.append(ServiceConflict(service.id, winner, "address", format_address(vip)))
                kept = tuple(each for each in service.vips if each != vip)
                service = msgspec.structs.replace(service, vips=kept)
            for port, winner in lost_ports.get(service.id, ()):
                value = f"{port.published}/{port.protocol}"
                clashes.append(ServiceConflict(service.id, winner, "port", value))
                closed = msgspec.structs.replace(port, published=0, published_at="")
                ports = tuple(closed if each == port else each for each in service.ports)
                service = msgspec.structs.replace(service, ports=ports)
            losers[service.id] = service
        return losers

    def _lost_ports(self) -> dict[str, list[tuple[Port, str]]]:
        """Service -> its published ports that older ones have, each with that one's id."""
        found: dict[str, list[tuple[Port, str]]] = {}
        for key in sorted(self._shared):
            ids = self._ports[key]
            holding: list[tuple[Service, Port]] = []
            for id in sorted(ids, key=lambda id: age(self._best[id])):
                service = self._best[id]
                for port in service.published:
                    if (port.protocol, port.published) != key:
                        continue
                    winner = next((o for o, p in holding if meet(service, port, o, p)), None)
                    if winner is None or winner.id == id:
                        holding.append((service, port))
                    else:
                        found.setdefault(id, []).append((port, winner.id))
        return found

    def _free_name(self, loser: Age, service: Service, given: set[tuple[str, str]]) -> str:
        for size in ID_PIECES:
            shown = f"{service.name[: NAME_MAX - 1 - size]}-{loser[1][:size]}"
            key = (service.network, shown)
            if key not in self._names and key not in given:
                break
        return shown


def _discard(index: dict[K, dict[str, None]], key: K, id: str) -> None:
    held = index[key]
    del held[id]
    if not held:
        del index[key]
