"""The three moments of a seal: an origin makes it, a receiver checks it, a relay shows it on.

PURE. What comes from the origin itself over a stream that shows who it is needs no check to be
taken, only seals to look at: they are checked before any of it is passed on, since who passes on
what does not hold would look guilty itself. What comes from anybody else is checked at once.

What stands opposite: core/seals.py, a seal and where it is kept; core/replica.py calls.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING

from agent.core.seals import (
    LEAF,
    NOTHING,
    RUN,
    SEALS_MAX,
    Held,
    Seal,
    Sealer,
    Seals,
    Standing,
    Unproven,
)

if TYPE_CHECKING:
    from agent.core.replica import Delta, Record

_version = attrgetter("version")


def seal_own(sealer: Sealer, me: str, seals: Seals, delta: Delta) -> None:
    """Seal what of a delta of our own is not sealed yet."""
    records, upto, floor = delta.records, delta.upto, delta.floor
    cover = seals.cover(records, upto, floor, len(records) + 3)
    if cover.complete:
        return
    fresh = records[cover.records :]
    head = seals.head()
    if fresh and head and head.seal.last >= fresh[0].version:  # else they are new, all of them
        fresh = [record for record in fresh if seals.find(record.version) is None]
    runs: list[tuple[int, bytearray]] = []  # first version, leaves
    leaves = sealer.leaves(me, fresh)
    if fresh and fresh[-1].version - fresh[0].version == len(fresh) - 1:  # nothing overwritten
        for start in range(0, len(fresh), RUN):
            run = bytearray().join(leaves[start : start + RUN])
            runs.append((fresh[start].version, run))
    else:
        for record, leaf in zip(fresh, leaves, strict=True):
            _extend(runs, record.version, leaf)
    if seals.find(upto, living=False) is None:
        _extend(runs, upto, NOTHING)
    if floor > upto and (head is None or head.seal.last < floor):
        _extend(runs, floor, NOTHING)
    if runs:
        runs[0] = _double(seals, *runs[0])
    seals.add([sealer.make(me, first, bytes(leaves)) for first, leaves in runs], Standing.PROVEN)


def _extend(runs: list[tuple[int, bytearray]], version: int, leaf: bytes) -> None:
    """Add a version to the last of some runs, or begin another."""
    if runs:
        first, leaves = runs[-1]
        place = (version - first) * LEAF
        if place == len(leaves) < RUN * LEAF:
            leaves += leaf
            return
        if place < len(leaves):
            return  # it is in there
        if place < RUN * LEAF:
            leaves += bytes(place - len(leaves)) + leaf
            return
    runs.append((version, bytearray(leaf)))


def _double(seals: Seals, first: int, leaves: bytearray) -> tuple[int, bytearray]:
    """Join a run to those right before it that are not longer, as digits carry over."""
    while before := seals.find(first - 1, living=False):
        seal = before.seal
        count = seal.last - seal.first + 1
        longer = count * LEAF > len(leaves) or count + len(leaves) // LEAF > RUN
        if seal.last != first - 1 or longer or seal.folded:
            break
        first, leaves = seal.first, bytearray(seal.leaves) + leaves
    return first, leaves


def check(sealer: Sealer, delta: Delta, known: Seals, sender: str) -> Standing | None:
    """Look at a delta that `sender` sent; how its seals stand then. `known` are those held of
    its origin. Unproven if they do not hold; None if there is no key to check them with."""
    origin = delta.origin
    if delta.certificate:
        sealer.keys.meet(origin, delta.certificate)
    if not _covers(delta):
        raise Unproven(origin, "unsealed", "came without the seals that cover them")
    if sender == origin:
        return Standing.UNSEEN
    if len(delta.seals) > SEALS_MAX:
        raise Unproven(origin, "unsealed", f"came with {len(delta.seals)} seals at once")
    if not sealer.keys.knows(origin):
        return None
    for seal in delta.seals:
        if not known.holds(seal) and not sealer.is_signed(origin, seal):
            raise Unproven(origin, "signature", "came with a seal that is not its signature")
    if _find_altered(sealer, origin, delta.records, delta.seals):
        raise Unproven(origin, "altered", "are not what was sealed")
    return Standing.PROVEN


def check_held(sealer: Sealer, delta: Delta, held: Sequence[Held]) -> bool:
    """Check what is about to be passed on, unless it was before; False if it cannot be.

    Unproven, once, if its origin told us what it does not stand for.
    """
    origin = delta.origin
    fresh = [h for h in held if h.standing is not Standing.PROVEN]
    if not fresh:
        return True
    if any(h.standing is Standing.FALSE for h in fresh) or not sealer.keys.knows(origin):
        return False
    for one in fresh:
        if one.standing is Standing.UNSEEN and not sealer.is_signed(origin, one.seal):
            one.standing = Standing.FALSE
            raise Unproven(origin, "signature", "came from it with a seal that is not its own")
        one.standing = Standing.SIGNED
    seals = [one.seal for one in held]
    for one in fresh:
        first, last = one.seal.first, one.seal.last
        under = _within(delta.records, first, last)
        if _find_altered(sealer, origin, under, seals):
            one.standing = Standing.FALSE
            raise Unproven(origin, "altered", "came from it as something else than it sealed")
        if delta.base < first and last <= delta.upto:
            one.standing = Standing.PROVEN  # none of what is under it was left out
    return True


def _within(records: Sequence[Record], first: int, last: int) -> Sequence[Record]:
    """The records of the versions first..last."""
    start = bisect_left(records, first, key=_version)
    return records[start : bisect_right(records, last, start, key=_version)]


def _covers(delta: Delta) -> bool:
    seals = Seals(delta.seals)
    return seals.cover(delta.records, delta.upto, delta.floor, len(delta.seals) + 3).complete


def _find_altered(
    sealer: Sealer, origin: str, records: Sequence[Record], seals: Sequence[Seal]
) -> int:
    """The version of a record that has its leaf in none of `seals`, which are in order; or 0."""
    start = 0
    leaves = sealer.leaves(origin, records)
    for record, mine in zip(records, leaves, strict=True):
        version = record.version
        while start < len(seals) and seals[start].last < version:
            start += 1
        for place in range(start, len(seals)):  # hardly ever more than one: they seldom overlap
            seal = seals[place]
            if seal.first > version:
                return version
            if version <= seal.last and seal.leaf(version) == mine:
                break
        else:
            return version
    return 0
