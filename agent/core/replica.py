"""The replica: what this node knows of every node's records, by origin and version.

Scuttlebutt reconciliation (van Renesse, Dumitriu, Gough, Thomas: "Efficient reconciliation and
flow control for anti-entropy protocols", 2008). Each node writes records only under its own
origin, each write under the next version, so merging needs no conflict rule: of one key the
higher version is the newer. A digest says up to which version one has each origin; a delta
carries what came after. Values are opaque here.

A delta covers the versions base < v <= upto *completely*: records that were overwritten since
are absent because a later version of them follows. So who has version `base` and takes it has
version `upto`, with no holes, and who has less must not take it.

What stands opposite: core/session.py moves deltas between two replicas; core/origin.py is what is
held of each origin.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from agent.core.origin import Origin
from agent.core.sealing import check, check_held, seal_own
from agent.core.seals import SEALS_MAX, Seal, Sealer, Seals, Standing, Unproven

# How far own versions jump when some may have been lost: more than were written since anything
# was synced to the disk. 67 million jumps fit below 2^62.
JUMP = 1 << 36
VERSION_MAX = 1 << 62  # a thousand writes a second for a hundred million years; fits SQLite
# Jumps that a disk may have missed. A peer that tells of more of them is broken or hostile: its
# word would carry our versions to where nobody takes them any more.
JUMPS_MAX = 1024
# What a hostile origin can make all others hold. Ten times the nodes that are meant, ...
ORIGINS_MAX = 10_000
# ... ten times the endpoints that are meant to live on one, tombstones and all, ...
ORIGIN_RECORDS_MAX = 1_000_000
ORIGIN_BYTES_MAX = 1 << 29  # ... and five times what those have in values, at 100 bytes each.


def beyond(version: int) -> int:
    """A version above `version` and above all that may have been written after it and lost."""
    return (version // JUMP + 1) * JUMP


class Record(NamedTuple):
    """One key's newest state. An empty value is a tombstone."""

    key: str
    version: int
    value: bytes


_as_record = functools.partial(tuple.__new__, Record)  # what Record._make does, and faster


@dataclass(slots=True)
class Delta:
    """Everything that `origin` changed in base < version <= upto, oldest first.

    With `reset` it is a part of a whole state (the first has base 0) that replaces, once the
    `complete` part has come, all that the receiver had of that origin.

    `seals` prove that all of it is the origin's (core/seals.py), and `certificate` shows its key
    to who may not know it yet.
    """

    origin: str
    base: int
    upto: int
    records: list[Record]
    floor: int = 0
    reset: bool = False
    complete: bool = False
    seals: tuple[Seal, ...] = ()
    certificate: bytes = b""


class Change(msgspec.Struct, frozen=True, gc=False):
    """A key whose value changed by a merge. An empty `value` says that it is gone."""

    origin: str
    key: str
    value: bytes


class Replica:
    """All origins' records as this node has them.

    Own records become visible to others only by `publish`, which the owner calls once they
    are on disk: what peers have seen can then never be unknown to its writer after a crash.
    """

    def __init__(self, me: str, sealer: Sealer | None = None) -> None:
        """Without a `sealer` nothing is sealed, and whoever sends it is believed."""
        self.me = me
        self.sealer = sealer
        self.on_false: Callable[[Unproven], None] = lambda error: None  # an origin lied of itself
        self.published = 0
        self.changed: set[str] = set()  # other origins, since who looks at it cleared it
        self._origins: dict[str, Origin] = {me: Origin()}
        self._incoming: dict[str, Origin] = {}  # whole states that are not complete yet
        self.doubted: set[str] = set()  # origins that are to be asked themselves for all they hold
        # The published past: own records that were overwritten by others which are not
        # published, oldest first. Until those are, these are what there is: a delta that left
        # them out would promise what a crash before the next publication never keeps.
        self._past: dict[str, list[Record]] = {}
        self._digest: dict[str, tuple[int, int]] | None = None  # as last asked for, if it holds

    def put(self, key: str, value: bytes) -> Record:
        """Write one of our own records."""
        own = self._origins[self.me]
        record = Record(key, own.version + 1, value)
        old = own.records.get(key)
        if old is not None:
            self._past.setdefault(key, []).append(old)
        own.put(record)
        return record

    def put_all(self, values: Sequence[tuple[str, bytes]]) -> list[Record]:
        """Write several, in this order."""
        own = self._origins[self.me]
        keys = [key for key, _ in values]
        if not own.records.keys().isdisjoint(keys) or len(set(keys)) < len(keys):
            return [self.put(key, value) for key, value in values]
        rows = [(key, v, value) for v, (key, value) in enumerate(values, own.version + 1)]
        fresh = list(map(_as_record, rows))
        own.put_all(fresh)
        own.version += len(fresh)
        return fresh

    def delete(self, key: str) -> Record:
        """Write a tombstone over one of our own records."""
        return self.put(key, b"")

    def publish(self, version: int) -> None:
        """Let others see our own records up to `version`."""
        self._digest = None
        self.published = max(self.published, version)
        own = self._origins[self.me]
        if own.version <= self.published:
            self._past.clear()
            return
        for key, past in list(self._past.items()):
            if own.records[key].version <= self.published:
                del self._past[key]
            else:
                while len(past) > 1 and past[1].version <= self.published:
                    del past[0]

    def restore(self, records: Iterable[Record], version: int, floor: int) -> None:
        """Take our own records from disk, at start, oldest first."""
        self._digest = None
        own = self._origins[self.me]
        for record in records:
            own.put(record)
        own.version = max(own.version, version)
        own.raise_floor(floor)
        self.published = own.version

    def restore_peer(
        self,
        origin: str,
        records: Iterable[Record],
        version: int,
        floor: int,
        seals: Iterable[Seal] = (),
    ) -> list[Change]:
        """Take what was known of another origin from disk, at start, oldest first."""
        self._digest = None
        state = self._origins.setdefault(origin, Origin())
        for record in records:
            state.put(record)
        state.version, state.floor = version, floor
        state.seals.add(seals, Standing.UNSEEN)
        return [Change(origin, r.key, r.value) for r in state.records.values() if r.value]

    def generation(self, origin: str) -> int:
        """Differs once an origin's records were replaced as a whole."""
        state = self._origins.get(origin)
        return state.generation if state else -1

    def origins(self) -> list[str]:
        """Every origin of which something is known."""
        return list(self._origins)

    def version(self, origin: str) -> int:
        """The highest version of `origin` that is here without holes; 0 if none."""
        if origin == self.me:
            return self.published
        state = self._origins.get(origin)
        return state.version if state else 0

    def written(self) -> int:
        """The version of our own last write, published or not."""
        return self._origins[self.me].version

    def floor(self, origin: str) -> int:
        """The version up to which tombstones of `origin` have been collected here."""
        state = self._origins.get(origin)
        return state.floor if state else 0

    def digest(self) -> dict[str, tuple[int, int]]:
        """Origin -> (version, floor). The same dict as long as nothing changed: leave it as it is.

        A node of a thousand is asked for it on each of a dozen streams every second.
        """
        if self._digest is None:
            self._digest = {o: (state.version, state.floor) for o, state in self._origins.items()}
            self._digest[self.me] = (self.published, self._origins[self.me].floor)
        return self._digest

    def get(self, origin: str, key: str) -> bytes:
        """The value of a key; empty if there is none."""
        state = self._origins.get(origin)
        record = state.records.get(key) if state else None
        return record.value if record else b""

    def records(self, origin: str) -> list[Record]:
        """Every record of an origin, tombstones and unpublished ones too, oldest first."""
        state = self._origins.get(origin)
        return list(state.records.values()) if state else []

    def items(self, origin: str) -> list[Record]:
        """The live records of an origin, oldest first."""
        state = self._origins.get(origin)
        return list(state.living().values()) if state else []

    def since(self, origin: str, version: int) -> list[Record]:
        """The records of `origin` after `version`, oldest first; the cost is their number."""
        state = self._origins.get(origin)
        if state is None:
            return []
        tail = state.since(version)
        if origin == self.me:
            while tail and tail[-1].version > self.published:
                tail.pop()
            past = [p[0] for p in self._past.values() if version < p[0].version <= self.published]
            if past:
                tail = sorted(tail + past, key=lambda record: record.version)
        return tail

    def admits(self, delta: Delta) -> bool:
        """Whether there is room for a delta, whatever it replaces of what is here."""
        state = self._origins.get(delta.origin)
        if state is None and len(self._origins) >= ORIGINS_MAX:
            return False
        if delta.reset:
            state = self._incoming.get(delta.origin) if delta.base else None
        count, size = (len(state.records), state.size) if state else (0, 0)
        if count + len(delta.records) > ORIGIN_RECORDS_MAX:
            return False
        return size + sum([len(r.value) for r in delta.records]) <= ORIGIN_BYTES_MAX

    def prove(self, delta: Delta, introduce: bool = False) -> bool:
        """Add its seals to a delta made from here; with `introduce` the origin's certificate too.

        Another origin's may come out shorter, if it takes more than SEALS_MAX: then `upto` says
        how far it goes. False if it cannot be proven: the records may have changed since they
        were asked for, or their origin told us what it does not stand for, or its key is not
        known here yet.
        """
        sealer, state = self.sealer, self._origins.get(delta.origin)
        if sealer is None or state is None:
            return True
        if delta.origin == self.me:
            self._seal(sealer, state, delta)
        most = SEALS_MAX if delta.origin != self.me else len(delta.records) + 3
        cover = state.seals.cover(delta.records, delta.upto, delta.floor, most)
        if not cover.complete and 0 < cover.records < len(delta.records):
            delta.records = delta.records[: cover.records]
            delta.upto, delta.complete = delta.records[-1].version, False
            cover = state.seals.cover(delta.records, delta.upto, delta.floor, most)
        if not cover.complete:
            return False
        if delta.origin != self.me:
            try:
                if not check_held(sealer, delta, cover.held):
                    return False
            except Unproven as error:
                self.on_false(error)
                return False
        delta.seals = tuple(held.seal for held in cover.held)
        if introduce:
            delta.certificate = sealer.keys.certificate(delta.origin)
        return True

    def _seal(self, sealer: Sealer, own: Origin, delta: Delta) -> None:
        seal_own(sealer, self.me, own.seals, delta)
        if own.seals.is_full:
            past = [record.version for records in self._past.values() for record in records]
            own.seals.prune(sorted([*past, *(r.version for r in own.records.values())]))

    def seals(self, origin: str, records: Sequence[Record], upto: int) -> list[Seal]:
        """The seals here that cover records of `origin` (oldest first), to be kept with them."""
        state = self._origins.get(origin)
        if state is None or self.sealer is None:
            return []
        cover = state.seals.cover(records, upto, state.floor, len(records) + 3)
        return [held.seal for held in cover.held]

    def all_seals(self, origin: str) -> tuple[list[Seal], int]:
        """All of an origin's, and a number that differs once some of them were dropped."""
        state = self._origins.get(origin)
        return (state.seals.all(), state.seals.prunings) if state else ([], 0)

    def merge(self, delta: Delta, sender: str = "") -> list[Change] | None:
        """Take a peer's delta; what changed by it, or None if something before it is missing.

        Deltas may come twice, late and out of order. A delta about our own origin is only
        looked at for its version: see `surpass`. Unproven if it is to be taken and `sender`, who
        is not its origin, cannot show that it is the origin's.
        """
        if delta.origin == self.me:
            return []
        state = self._origins.get(delta.origin)
        standing = self._check(state, delta, sender)
        if standing is None:
            return None
        if state is None:
            state = self._origins[delta.origin] = Origin()
            self._digest = None
            self.changed.add(delta.origin)
        if delta.reset:
            return self._merge_reset(state, delta, standing, sender)
        if delta.upto <= state.version:
            return []
        if delta.base > state.version:
            return None
        if 0 < state.version < delta.floor and state.floor < delta.floor:
            # The sender did not know how little we have: tombstones that we lack are gone there.
            # (With its floor here already, we are in the midst of taking all of it.)
            return None
        self._digest = None
        known, origin = state.version, delta.origin
        self.changed.add(origin)
        fresh = [record for record in delta.records if record.version > known]
        state.put_all(fresh)
        changes = [Change(origin, key, value) for key, _, value in fresh]
        state.version = delta.upto
        state.raise_floor(delta.floor)
        state.keep_seals(delta.seals, standing)
        if delta.origin in self.doubted:
            self._note_doubt(delta.origin, state)
        return changes

    def _check(self, state: Origin | None, delta: Delta, sender: str) -> Standing | None:
        """How the seals of a delta stand that may be taken; None if its key is not known yet."""
        version = state.version if state else 0
        if self.sealer is None or not (delta.reset or delta.base <= version < delta.upto):
            return Standing.PROVEN  # nothing of it is kept
        return check(self.sealer, delta, state.seals if state else Seals(), sender)

    def _merge_reset(
        self, state: Origin, delta: Delta, standing: Standing, sender: str
    ) -> list[Change] | None:
        # Who passes on a whole state may have left out what lives, and what was deleted for good
        # cannot be shown: only its origin's own takes anything away.
        is_final = self.sealer is None or sender == delta.origin
        is_new = delta.upto > state.version or (is_final and bool(state.doubted))
        if not is_new and delta.complete:
            self._incoming.pop(delta.origin, None)
            return []
        incoming = self._incoming.get(delta.origin)
        if delta.base == 0:
            incoming = self._incoming[delta.origin] = Origin(sender=sender)
        if incoming is None or delta.base > incoming.version or incoming.sender != sender:
            return None
        for record in delta.records:
            if record.version > incoming.version:
                incoming.put(record)
        incoming.version = max(incoming.version, delta.upto)
        incoming.keep_seals(delta.seals, standing)
        if not delta.complete:
            return []
        del self._incoming[delta.origin]
        if incoming.version < state.version or not is_new:
            return []
        self._digest = None
        self.changed.add(delta.origin)
        incoming.floor = max(delta.floor, state.floor)
        incoming.generation = state.generation + 1
        before = state.living()
        lacking = {key: record for key, record in before.items() if key not in incoming.records}
        if not is_final:
            incoming.doubted = lacking
        self._note_doubt(delta.origin, incoming)
        self._origins[delta.origin] = incoming
        changes = [Change(delta.origin, key, b"") for key in lacking if is_final]
        for key, record in incoming.records.items():
            old = before.get(key) or state.records.get(key)
            if old is None or old.value != record.value:
                changes.append(Change(delta.origin, key, record.value))
        return changes

    def is_believable(self, version: int) -> bool:
        """Whether we may have written `version` of our own origin and lost it."""
        most = self._origins[self.me].version + JUMPS_MAX * JUMP
        return version <= most and beyond(version) <= VERSION_MAX - JUMP

    def _note_doubt(self, origin: str, state: Origin) -> None:
        if state.doubted:
            self.doubted.add(origin)
        else:
            self.doubted.discard(origin)

    def surpass(self, version: int) -> bool:
        """Called when a peer has `version` of *our* origin: True if we had lost that.

        Our disk forgot what we had already published (an old backup, a disk that lied about
        what it had written). We go on beyond it, and our floor there makes every peer take our
        whole state instead of ours on top of what we no longer know.
        """
        own = self._origins[self.me]
        if version <= own.version or not self.is_believable(version):
            return False
        self._digest = None
        live = [r for r in own.records.values() if r.value]
        start = beyond(version)
        fresh = self._origins[self.me] = Origin(version=start, floor=start)
        self._past.clear()
        self.published = 0  # these versions are to be on disk for good before they are told
        for record in live:
            fresh.put(Record(record.key, fresh.version + 1, record.value))
        return True

    def collect(self, origin: str, upto: int) -> int:
        """Drop the tombstones of `origin` up to `upto`; how many. Everyone must have them."""
        state = self._origins.get(origin)
        if state is None or upto <= state.floor:
            return 0
        self._digest = None
        before = len(state.records)
        state.raise_floor(upto)
        return before - len(state.records)

    def forget(self, origin: str) -> list[Change]:
        """Drop an origin altogether; the keys that go with it."""
        self._digest = None
        self.changed.add(origin)
        self._incoming.pop(origin, None)
        state = self._origins.pop(origin, None)
        if state is None:
            return []
        self.doubted.discard(origin)
        return [Change(origin, key, b"") for key in state.living()]

    def size(self, origin: str) -> int:
        """How many records of an origin are held, tombstones and unpublished ones included."""
        state = self._origins.get(origin)
        return len(state.records) if state else 0

    def count(self) -> int:
        """How many records are held, tombstones included."""
        return sum(len(state.records) for state in self._origins.values())
