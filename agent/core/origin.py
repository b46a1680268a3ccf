"""One origin's records as a replica holds them: in the order of their versions, with tombstones.

What is here knows nothing of deltas and of whose word counts: it keeps the order, the tombstones
down to the floor, the seals, and what is in doubt.
What stands opposite: replica.py, which has one of these for each origin and says what goes in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent.core.seals import Seal, Seals, Standing

if TYPE_CHECKING:
    from agent.core.replica import Record


@dataclass(slots=True)
class Origin:
    """One origin's records, up to `version` without holes."""

    # Always in the order of versions: an overwritten key leaves its place and goes to the end,
    # so that what came after a version is a tail, found without looking at the rest.
    records: dict[str, Record] = field(default_factory=dict)
    version: int = 0
    tombstones: dict[str, int] = field(default_factory=dict)  # key -> version, in that order
    floor: int = 0  # tombstones up to here are collected; who has less needs the whole state
    generation: int = 0  # counts whole states taken in place of what was here
    size: int = 0  # bytes of all values
    seals: Seals = field(default_factory=Seals)
    sender: str = ""  # of a whole state that is not complete yet
    # What lived here and is not in the whole state that a third node sent since: maybe deleted.
    # Views keep it until the origin itself says so; nobody is sent it.
    doubted: dict[str, Record] = field(default_factory=dict)

    def living(self) -> dict[str, Record]:
        """The live records by key, with those in doubt."""
        living = {key: record for key, record in self.records.items() if record.value}
        return {**self.doubted, **living} if self.doubted else living

    def put(self, record: Record) -> None:
        """Take a record that is newer than all that are here."""
        old = self.records.pop(record.key, None)
        self.size += len(record.value) - (len(old.value) if old else 0)
        self.records[record.key] = record
        if self.doubted:
            self.doubted.pop(record.key, None)
        self.tombstones.pop(record.key, None)
        if not record.value:
            self.tombstones[record.key] = record.version
        self.version = record.version

    def put_all(self, fresh: list[Record]) -> None:
        """The same for many, of which most are new."""
        records, tombstones = self.records, self.tombstones
        for record in fresh:
            key, version, value = record
            if key in records:
                self.size -= len(records.pop(key).value)
                tombstones.pop(key, None)
            records[key] = record
            if value:
                self.size += len(value)
            else:
                tombstones[key] = version
        if self.doubted:
            for record in fresh:
                self.doubted.pop(record.key, None)

    def raise_floor(self, floor: int) -> None:
        """Drop the tombstones up to `floor`."""
        if floor <= self.floor:
            return
        self.floor = floor
        for key, version in list(self.tombstones.items()):
            if version > floor:
                break
            del self.tombstones[key]
            del self.records[key]

    def keep_seals(self, seals: Iterable[Seal], standing: Standing) -> None:
        """Take seals, and make room where there are too many."""
        self.seals.add(seals, standing)
        if self.seals.is_full:
            self.seals.prune([record.version for record in self.records.values()])

    def since(self, version: int) -> list[Record]:
        """The records after `version`, oldest first; the cost is their number."""
        if version <= 0:
            return list(self.records.values())
        tail: list[Record] = []
        for record in reversed(self.records.values()):
            if record.version <= version:
                break
            tail.append(record)
        tail.reverse()
        return tail
