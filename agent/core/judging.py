"""Named objects that any node may write: which record of one counts, and who of several wins.

Each node writes under its own origin, so of one object there may be several records, and of
one name (or number) several objects, made where their makers could not see each other. The
rules are functions of the records alone, so all nodes that have the same records judge alike,
in whatever order they came:

* of one object the record with the highest (stamp, origin) counts, except that a deletion is
  final: a change made elsewhere at the same time must not raise what was deleted;
* of several objects with one key the oldest holds it, by (born, id). `born` is the stamp of
  the creation (core/clock.py), so who was created after having been seen is the younger.

What stands opposite: core/catalogue.py has networks judged here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Generic, Protocol, TypeVar

from agent.core.clock import stamp_at


class Named(Protocol):
    """What can be judged."""

    @property
    def id(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def stamp(self) -> int:
        """Of this record."""

    @property
    def born(self) -> int:
        """Stamp of the object's creation, the same in all its records; 0: see `created`."""

    @property
    def created(self) -> float:
        """Wall clock at the creation, seconds since the epoch; for people."""

    @property
    def deleted(self) -> bool: ...


N = TypeVar("N", bound=Named)
K = TypeVar("K", bound=Hashable)
Age = tuple[int, str]  # born, id: the smaller is the older


def age(object: Named) -> Age:
    """What objects are ordered by when they cannot all have what they claim."""
    return object.born or stamp_at(object.created), object.id


class Written(Generic[N]):
    """Every origin's record of every object, and the one that counts."""

    def __init__(self) -> None:
        self._records: dict[str, dict[str, N]] = {}  # id -> origin -> its record
        self._counts: Counter[str] = Counter()  # origin -> records of objects that it lets live

    def put(self, origin: str, record: N) -> None:
        """Take an origin's record, in place of what it had written of that object."""
        records = self._records.setdefault(record.id, {})
        self._counts[origin] += _lives(record) - _lives(records.get(origin))
        records[origin] = record

    def drop(self, origin: str, id: str) -> None:
        """An origin withdrew its record."""
        records = self._records.get(id, {})
        self._counts[origin] -= _lives(records.pop(origin, None))
        if not records:
            self._records.pop(id, None)

    def count(self, origin: str) -> int:
        """How many objects an origin has a record of that does not delete them."""
        return self._counts[origin]

    def records(self, id: str) -> dict[str, N]:
        """Origin -> its record of this object, deleted or not."""
        return dict(self._records.get(id, {}))

    def best(self, id: str) -> N | None:
        """The record that counts; None if there is none, or the object was deleted."""
        records = self._records.get(id)
        if not records or any(record.deleted for record in records.values()):
            return None
        return max(records.items(), key=lambda r: (r[1].stamp, r[0]))[1]


def _lives(record: Named | None) -> bool:
    return record is not None and not record.deleted


class Claimants(Generic[K]):
    """Who claims each key that only one may hold, oldest first."""

    def __init__(self) -> None:
        self._ages: dict[K, list[Age]] = {}
        self._contested: set[K] = set()

    def add(self, key: K, age: Age) -> None:
        """An object claims a key."""
        ages = self._ages.setdefault(key, [])
        insort(ages, age)
        if len(ages) > 1:
            self._contested.add(key)

    def discard(self, key: K, age: Age) -> None:
        """It claims it no longer."""
        ages = self._ages[key]
        del ages[bisect_left(ages, age)]
        if not ages:
            del self._ages[key]
        if len(ages) < 2:
            self._contested.discard(key)

    def holder(self, key: K) -> str:
        """The id of the object that holds a key that is claimed."""
        return self._ages[key][0][1]

    def losers(self) -> Iterator[tuple[Age, K]]:
        """The objects that claim what an older one holds, each with that."""
        for key in self._contested:
            for age in self._ages[key][1:]:
                yield age, key

    def __contains__(self, key: object) -> bool:
        return key in self._ages
