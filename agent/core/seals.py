"""Seals: how a record that came by way of others is known to be its origin's.

PURE; who signs and verifies is `Keys`. An origin signs not each record (35 µs) but runs of at
most `RUN` consecutive versions of its own: a *seal* is the list of the leaf hashes of what was
written under those versions and one Ed25519 signature over it (as a tree of hashes is signed at
its root; Merkle, 1987). Who has a record and a seal that covers its version can show anybody
that the origin wrote it. A delta always carries the seals that cover its records, its `upto` and
its floor; docs/seals.md says what a hostile member can still do.

Leaves stand in groups of `GROUP`, and what is signed are the hashes of the groups: where nothing
of a group lives any more, its hash stands in for it (`folded`), so an old run with one living
record takes 300 bytes, not 1,100. An origin that writes one record at a time seals runs that
double like the digits of a binary counter, so n writes leave n / RUN seals behind, not n.

What stands opposite: core/replica.py, which holds an origin's seals beside its records;
cluster/signing.py, the keys.
"""

from __future__ import annotations

import enum
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple, Protocol

from agent.errors import Unavailable

if TYPE_CHECKING:
    from agent.core.replica import Record

RUN = 64  # versions a seal; at 16, what a record costs to be signed and checked is four times this
GROUP = 8  # leaves; the square root of RUN makes a seal with one living record the shortest
LEAF = 16  # bytes; a second record for a leaf takes 2^128 tries, of an origin against itself 2^64
SPARE = 16  # seals of one origin that may be of no use any more, at 1.2 kB
SIGNATURE = 64  # bytes; Ed25519 (RFC 8032)
NOTHING = bytes(LEAF)  # the leaf of a version of which nothing is left to be sealed
SEALS_MAX = 512  # a delta of another; its receiver checks them in one go, 54 ms at 106 µs each
_CONTEXT = b"vxmesh seal 1\0"
_LEAF_HEAD = struct.Struct(">QI")  # version, length of the key
_LEAF_PERSON, _FOLD_PERSON = b"vxmesh leaf 1", b"vxmesh fold 1"


class Seal(NamedTuple):
    """What an origin wrote under the versions first..last, and its signature over it.

    `leaves` has LEAF bytes for each version, but for the groups whose bit is in `folded`: of
    those only LEAF bytes, their hash.
    """

    first: int
    last: int
    leaves: bytes
    folded: int
    signature: bytes

    def parts(self) -> Iterable[tuple[int, bytes]]:
        """Each group's first version, and its leaves or its hash."""
        position = 0
        for number, first in enumerate(range(self.first, self.last + 1, GROUP)):
            count = 1 if self.folded >> number & 1 else min(GROUP, self.last + 1 - first)
            yield first, self.leaves[position : position + count * LEAF]
            position += count * LEAF

    def leaf(self, version: int) -> bytes:
        """The leaf of a version in first..last; empty if its group is folded."""
        index = version - self.first
        if not self.folded:
            return self.leaves[index * LEAF : index * LEAF + LEAF]
        number, place = divmod(index, GROUP)
        if self.folded >> number & 1:
            return b""
        # Each folded group before it is shorter by all of its leaves but one.
        away = (self.folded & ((1 << number) - 1)).bit_count() * (GROUP - 1)
        start = (number * GROUP + place - away) * LEAF
        return self.leaves[start : start + LEAF]

    def size(self) -> int:
        """How many bytes of leaves there have to be; see `folded`."""
        return sum(
            LEAF if self.folded >> number & 1 else LEAF * min(GROUP, self.last + 1 - first)
            for number, first in enumerate(range(self.first, self.last + 1, GROUP))
        )

    def fold(self, living: Iterable[int]) -> Seal:
        """The same without the leaves of groups in which none of `living` (versions) is."""
        kept = {(version - self.first) // GROUP for version in living}
        folded, leaves = self.folded, bytearray()
        for number, (_, part) in enumerate(self.parts()):
            if number in kept or folded >> number & 1 or len(part) == LEAF:
                leaves += part
            else:
                folded |= 1 << number
                leaves += _fold(part)
        return self if folded == self.folded else self._replace(leaves=bytes(leaves), folded=folded)


class Unproven(Unavailable):
    """A peer sent what it does not show to be its origin's. `reason` is a word, for a metric."""

    def __init__(self, origin: str, reason: str, why: str) -> None:
        super().__init__(f"records of {origin[:40]}", why)
        self.origin = origin
        self.reason = reason


REASONS = ("unsealed", "altered", "signature")


class Keys(Protocol):
    """Who signs for this node and knows the others' keys."""

    def sign(self, message: bytes) -> bytes:
        """This node's signature, SIGNATURE bytes."""

    def verify(self, origin: str, message: bytes, signature: bytes) -> bool:
        """Whether `origin` signed; False also if its key is not known."""

    def knows(self, origin: str) -> bool:
        """Whether the key of `origin` is known."""

    def certificate(self, origin: str) -> bytes:
        """What shows the key of `origin` to others; empty if nothing is known."""

    def meet(self, origin: str, certificate: bytes) -> None:
        """A certificate was shown: if it is one, the key of `origin` is known from now on."""


class Sealer:
    """Makes and checks the seals of one cluster."""

    def __init__(self, cluster: str, keys: Keys) -> None:
        self.keys = keys
        self._cluster = cluster
        self._bases: dict[str, Callable[[], blake2b]] = {}  # by origin: a hash to begin a leaf with

    def leaves(self, origin: str, records: Sequence[Record]) -> list[bytes]:
        """The hashes of records. Cluster, origin and key come with their length, the version has
        eight bytes and the value is the rest: no other record makes the same input."""
        begin = self._bases.get(origin)
        if begin is None:
            base = blake2b(_named(self._cluster, origin), digest_size=LEAF, person=_LEAF_PERSON)
            begin = self._bases[origin] = base.copy
        found, head = [], _LEAF_HEAD.pack
        for name, version, value in records:
            key = name.encode()
            leaf = begin()
            leaf.update(head(version, len(key)) + key + value)
            found.append(leaf.digest())
        return found

    def make(self, origin: str, first: int, leaves: bytes) -> Seal:
        """This node's seal over the versions from `first` on; `origin` is its id."""
        seal = Seal(first, first + len(leaves) // LEAF - 1, leaves, 0, b"")
        return seal._replace(signature=self.keys.sign(self._message(origin, seal)))

    def is_signed(self, origin: str, seal: Seal) -> bool:
        """Whether `origin` signed it."""
        return self.keys.verify(origin, self._message(origin, seal), seal.signature)

    def _message(self, origin: str, seal: Seal) -> bytes:
        parts = [
            part if seal.folded >> number & 1 else _fold(part)
            for number, (_, part) in enumerate(seal.parts())
        ]
        span = seal.first.to_bytes(8) + seal.last.to_bytes(8)
        return _CONTEXT + _named(self._cluster, origin) + span + b"".join(parts)


def _named(*names: str) -> bytes:
    data = [name.encode() for name in names]
    return b"".join(len(name).to_bytes(4) + name for name in data)


def _fold(leaves: bytes) -> bytes:
    return blake2b(leaves, digest_size=LEAF, person=_FOLD_PERSON).digest()


class Standing(enum.IntEnum):
    """What is known of a seal that is held."""

    FALSE = 0  # it came from its origin, and does not hold
    UNSEEN = 1  # it came from its origin, and nobody has looked
    SIGNED = 2  # its signature is the origin's; not all records under it have been compared
    PROVEN = 3  # all records under it are what it says


class Held:
    """A seal in its place. `whole`: it has a leaf for each of its versions."""

    __slots__ = ("seal", "standing", "whole")

    def __init__(self, seal: Seal, standing: Standing) -> None:
        self.seal = seal
        self.standing = standing
        self.whole = not seal.folded and NOTHING not in seal.leaves


class Cover(NamedTuple):
    """Seals for a delta."""

    held: list[Held]  # none if they are not all there
    records: int  # how many from the start have one
    complete: bool


class Seals:
    """The seals of one origin, in the order of their first versions. They may overlap."""

    def __init__(self, seals: Iterable[Seal] = (), standing: Standing = Standing.UNSEEN) -> None:
        self._firsts: list[int] = []
        self._held: list[Held] = []
        self._limit = SPARE  # prune above; see there
        self.prunings = 0
        self.add(seals, standing)

    def __len__(self) -> int:
        return len(self._held)

    def copy(self) -> Seals:
        """One that can be changed by itself."""
        fresh = Seals()
        fresh._firsts, fresh._limit, fresh.prunings = list(self._firsts), self._limit, self.prunings
        fresh._held = [Held(held.seal, held.standing) for held in self._held]
        return fresh

    def all(self) -> list[Seal]:
        """Every seal."""
        return [held.seal for held in self._held]

    def add(self, seals: Iterable[Seal], standing: Standing) -> None:
        """Take seals in. One that says no more than another goes: of a doubled run the halves."""
        for seal in seals:
            held = Held(seal, standing)
            if self._held and seal.first <= self._held[-1].seal.last:
                if not self._settle(held):
                    continue
                place = bisect_left(self._firsts, seal.first)
                self._firsts.insert(place, seal.first)
                self._held.insert(place, held)
            else:
                self._firsts.append(seal.first)
                self._held.append(held)

    def _settle(self, fresh: Held) -> bool:
        """Drop what `fresh` makes superfluous; False if it is superfluous itself."""
        seal = fresh.seal
        start = bisect_right(self._firsts, seal.first - RUN)
        for place in range(bisect_right(self._firsts, seal.last) - 1, start - 1, -1):
            old = self._held[place]
            if _says(old.seal, seal):
                old.standing = min(old.standing, fresh.standing)
                return False
            if _says(seal, old.seal):
                fresh.standing = min(fresh.standing, old.standing)
                del self._firsts[place], self._held[place]
        return True

    def holds(self, seal: Seal) -> bool:
        """Whether just this one is here and its signature was checked."""
        place = bisect_left(self._firsts, seal.first)
        while place < len(self._firsts) and self._firsts[place] == seal.first:
            held = self._held[place]
            if held.standing >= Standing.SIGNED and held.seal == seal:
                return True
            place += 1
        return False

    def find(self, version: int, living: bool = True) -> Held | None:
        """A seal with the leaf of a version; with `living` off, one that covers it at all."""
        place = bisect_right(self._firsts, version) - 1
        while place >= 0 and self._firsts[place] > version - RUN:
            held = self._held[place]
            if version <= held.seal.last and (
                held.whole or not living or held.seal.leaf(version) not in (b"", NOTHING)
            ):
                return held
            place -= 1
        return None

    def head(self) -> Held | None:
        """The seal that reaches highest."""
        return max(self._held[-RUN:], key=lambda held: held.seal.last, default=None)

    def cover(self, records: Sequence[Record], upto: int, floor: int, most: int) -> Cover:
        """Seals for records (oldest first), for `upto`, and for a floor above it."""
        found: dict[int, Held] = {}  # by identity
        done = 0
        while done < len(records):
            held = self.find(records[done].version)
            if held is None or (id(held) not in found and len(found) > most - 3):
                return Cover([], done, False)
            found[id(held)] = held
            done = _after(records, held.seal.last, done) if held.whole else done + 1
        last = self.find(upto, living=False)
        head = self.head() if floor > upto else last
        if last is None or head is None or head.seal.last < floor:
            return Cover([], done, False)
        found.update({id(last): last, id(head): head})
        return Cover(sorted(found.values(), key=lambda held: held.seal.first), done, True)

    @property
    def is_full(self) -> bool:
        """Whether it is time to `prune`: never more often than the number of seals doubles."""
        return len(self._held) > self._limit

    def prune(self, versions: Sequence[int]) -> None:
        """Drop what covers none of the living `versions` (sorted), and fold what does in part.

        The seal that reaches highest stays in any case: it proves how far the origin has got.
        """
        head, kept, claimed, end = self.head(), [], set[int](), 0
        for held in self._held:
            seal = held.seal
            low, high = bisect_left(versions, seal.first), bisect_right(versions, seal.last)
            living = versions[low:high]
            if seal.first > end:
                claimed.clear()
            if not held.whole or claimed:
                living = [
                    v for v in living if v not in claimed and seal.leaf(v) not in (b"", NOTHING)
                ]
            if not living and held is not head:
                continue
            claimed.update(living)
            end = max(end, seal.last)
            if len(living) < seal.last - seal.first + 1:
                held = Held(seal.fold(living), held.standing)
            kept.append(held)
        self._held, self._firsts = kept, [held.seal.first for held in kept]
        self._limit = 2 * len(kept) + SPARE
        self.prunings += 1


def _says(one: Seal, other: Seal) -> bool:
    """Whether a seal has each leaf that another one has."""
    if one.folded or other.folded:  # of two that were folded only the same one is looked at
        return one[:2] == other[:2] and all(
            mine == theirs or _fold(mine) == theirs
            for (_, mine), (_, theirs) in zip(one.parts(), other.parts(), strict=True)
        )
    start = (other.first - one.first) * LEAF
    within = one.first <= other.first and other.last <= one.last
    return within and one.leaves.startswith(other.leaves, start)


def _after(records: Sequence[Record], version: int, start: int) -> int:
    """The index of the first record above a version, looking from `start` on."""
    stop = min(len(records), start + RUN)
    return bisect_right(records, version, start, stop, key=lambda record: record.version)
