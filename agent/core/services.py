"""Where each service leads: its backends, by selector or named, and which take connections. PURE.

`Selection` keeps which endpoints each service chooses, at the cost of what changes; `rows` and
`taking` say how those are at this moment. The rules:

* a backend whose node counts as gone is none; it is one again when the node returns;
* new connections go to those that are healthy, are not drained and have a weight. One whose
  check has not said anything yet is not healthy; one that nothing checks is;
* if that leaves none, the service refuses (default), or takes all but the drained ones.

What stands opposite: agent/views.py feeds it; drivers/frontends.py makes the datapath's desired
state of it, agent/feed.py the names, api/ what people see.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Set
from typing import NamedTuple, TypeVar

from agent.core.members import EndpointChange, Member, Members
from agent.model import Endpoint
from agent.servicemodel import (
    ALL,
    HEALTHY,
    NO_CHECK,
    RUNTIME,
    UNKNOWN,
    Chosen,
    Health,
    Service,
)

K = TypeVar("K", bound=Hashable)
HealthOf = Callable[[Member], Health | None]
_PLAIN = Chosen("")


class Row(NamedTuple):
    """One backend of one service, as it is now."""

    endpoint: Endpoint
    node: str
    weight: int
    health: str  # healthy, unhealthy, unknown
    draining: bool
    since: float = 0.0  # when the drain began
    why: str = ""  # it is not healthy
    is_gone: bool = False  # its node counts as gone
    is_over: bool = False  # it is draining, and its time is up


class Selection:
    """Which endpoints each service chooses."""

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}
        self._chosen: dict[str, dict[str, None]] = {}  # service -> endpoint ids
        self._named: dict[str, set[str]] = {}  # endpoint -> services whose record names it
        self._choosers: dict[str, set[str]] = {}  # endpoint -> services that choose it
        # network, label, value -> endpoints that have it; services whose selector's first it is
        self._labelled: dict[tuple[str, str, str], dict[str, None]] = {}
        self._selecting: dict[tuple[str, str, str], set[str]] = {}

    def services_of(self, endpoint: str) -> Set[str]:
        """The services (ids) that an endpoint (id) is a backend of."""
        return self._choosers.get(endpoint, frozenset())

    def endpoints_of(self, service: str) -> list[str]:
        """The endpoints (ids) that are backends of a service (id), sorted."""
        return sorted(self._chosen.get(service, ()))

    def moved(self, changes: Iterable[EndpointChange]) -> set[str]:
        """As `move` of many: a bulk has 100,000."""
        touched: set[str] = set()
        named = self._named
        for change in changes:
            before, after = change.old, change.new
            if before is None and after is not None:
                new = after.endpoint
                if not new.labels and new.id not in named:
                    continue
            old = before.endpoint if before else None
            touched |= self.move(old, after.endpoint if after else None)
        return touched

    def move(self, old: Endpoint | None, new: Endpoint | None) -> set[str]:
        """An endpoint came, went or changed; the services (ids) that lead elsewhere by that."""
        touched: set[str] = set()
        if old and old.labels and (new is None or (new.network, new.labels) != _home(old)):
            for key, value in old.labels.items():
                held = self._labelled.get((old.network, key, value), {})
                held.pop(old.id, None)
                if not held:
                    self._labelled.pop((old.network, key, value), None)
        gone = old if old and (new is None or new.id != old.id) else None
        if gone:
            touched |= self._leave(gone.id)
        if new is None:
            return touched
        for key, value in new.labels.items():
            self._labelled.setdefault((new.network, key, value), {})[new.id] = None
        before = self._choosers.get(new.id, set())
        if not before and not new.labels and new.id not in self._named:
            return touched  # as nearly all are
        wanted = {id for id in self._candidates(new) if self._chooses(self._services[id], new)}
        for id in before - wanted:
            del self._chosen[id][new.id]
        for id in wanted - before:
            self._chosen[id][new.id] = None
        if wanted:
            self._choosers[new.id] = wanted
        else:
            self._choosers.pop(new.id, None)
        return touched | before | wanted

    def put(self, service: Service, members: Members | None) -> None:
        """A service came or changed; `members` are those of its network."""
        self.drop(service.id)
        id = service.id
        self._services[id] = service
        found: dict[str, None] = {}
        for each in service.backends:
            self._named.setdefault(each.endpoint, set()).add(id)
            if each.added and members and each.endpoint in members.all:
                found[each.endpoint] = None
        keys = [(service.network, key, value) for key, value in sorted(service.selector.items())]
        if keys:
            self._selecting.setdefault(keys[0], set()).add(id)
            least = min((self._labelled.get(key, {}) for key in keys), key=len)
            others = [held for key in keys if (held := self._labelled.get(key, {})) is not least]
            found.update(dict.fromkeys(e for e in least if all(e in held for held in others)))
        self._chosen[id] = found
        for endpoint in found:
            self._choosers.setdefault(endpoint, set()).add(id)

    def drop(self, id: str) -> None:
        """A service is gone. Nothing happens if there is none."""
        service = self._services.pop(id, None)
        if service is None:
            return
        for each in service.backends:
            _take_out(self._named, each.endpoint, id)
        for key, value in sorted(service.selector.items())[:1]:
            _take_out(self._selecting, (service.network, key, value), id)
        for endpoint in self._chosen.pop(id):
            _take_out(self._choosers, endpoint, id)

    def _leave(self, endpoint: str) -> set[str]:
        left = self._choosers.pop(endpoint, set())
        for id in left:
            del self._chosen[id][endpoint]
        return left

    def _candidates(self, endpoint: Endpoint) -> set[str]:
        found = set(self._named.get(endpoint.id, ()))
        for key, value in endpoint.labels.items():
            found |= self._selecting.get((endpoint.network, key, value), set())
        return found

    def _chooses(self, service: Service, endpoint: Endpoint) -> bool:
        if service.network != endpoint.network:
            return False
        named = service.chosen(endpoint.id)
        return bool(named and named.added) or service.selects(endpoint.labels)


def _home(endpoint: Endpoint) -> tuple[str, dict[str, str]]:
    return endpoint.network, endpoint.labels


def _take_out(index: dict[K, set[str]], key: K, id: str) -> None:
    held = index.get(key)
    if held is not None:
        held.discard(id)
        if not held:
            del index[key]


def rows(
    service: Service,
    members: Iterable[Member],
    health_of: HealthOf,
    withdrawn: Set[str],
    now: float,
) -> list[Row]:
    """A service's backends as they are at `now` (seconds since the epoch), sorted by id."""
    said = {each.endpoint: each for each in service.backends}
    found = []
    for member in members:
        chosen = said.get(member.endpoint.id, _PLAIN)
        health = health_of(member)
        limit = chosen.since + service.drain_timeout
        found.append(
            Row(
                member.endpoint,
                member.node,
                chosen.weight,
                health.of(service.id) if health else UNKNOWN,
                chosen.draining,
                chosen.since,
                health.why(service.id) if health else "",
                member.node in withdrawn,
                chosen.draining and service.drain_timeout > 0 and now >= limit,
            )
        )
    return sorted(found, key=lambda row: row.endpoint.id)


def is_checked(service: Service, endpoint: Endpoint) -> bool:
    """Whether something will say how this backend is. What has no sandbox of ours nobody can look
    at from inside: only the runtime can tell."""
    kind = service.health.kind
    return kind == RUNTIME or (kind != NO_CHECK and bool(endpoint.sandbox))


def is_ready(service: Service, row: Row) -> bool:
    """Whether a backend, as it is, takes new connections."""
    if row.is_gone or row.draining or not row.weight:
        return False
    unchecked = row.health == UNKNOWN and not is_checked(service, row.endpoint)
    return row.health == HEALTHY or unchecked


def taking(service: Service, rows: Iterable[Row]) -> list[Row]:
    """The backends that take new connections; empty if it is to refuse them."""
    rows = list(rows)
    ready = [row for row in rows if is_ready(service, row)]
    if not ready and service.all_unhealthy == ALL:
        return [row for row in rows if row.weight and not (row.is_gone or row.draining)]
    return ready
