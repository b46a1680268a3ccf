"""Stability: up to which version every live node has an origin's records.

PURE. An origin may drop a tombstone once it is stable, which is the word for it in group
communication (Birman; Guo and van Renesse, 1997). With bounded streams an origin hears only its
neighbours, so what all have is added up on the way to it: for each origin a node tells the
neighbour nearest to that origin on the ring of ids the lowest version on its side, and who that
is. Each hop is strictly nearer, so there are no circles whatever the streams are; where everyone
has a stream to everyone the next hop is the origin itself.

Who is counted is told as the sum of the hashes of the ids, modulo 2^64. The origin compares it
with the sum over the nodes that it holds for live: only if all of them, each once, are in it is
the version stable. Someone missing, counted twice while streams move, or counted though held for
dead gives another sum, and nothing is dropped until views agree. What is old is lower than what
is true, since versions only rise. The price: an entry for each origin that wrote, from each
node, an interval and hop later than the records themselves.

What stands opposite: core/session.py carries what `tell` says into `take` of the next node.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from agent.core.replica import ORIGINS_MAX
from agent.core.topology import CIRCLE, distance, position

WHOLE_EVERY = 30  # tellings; then all is told again, in case something was lost


class Reach(NamedTuple):
    """All nodes of one side have at least `version`; `members` is the sum of their hashes."""

    version: int
    members: int


NONE = Reach(0, 0)  # nobody comes this way any more


@dataclass(frozen=True, slots=True)
class Seen:
    """Origin -> what the sender's side has of it. With `whole` it replaces all said before."""

    entries: dict[str, Reach]
    whole: bool = False


@dataclass(slots=True)
class _Neighbour:
    heard: dict[str, Reach] = field(default_factory=dict)
    told: dict[str, Reach] = field(default_factory=dict)
    tellings: int = 0
    moved: bool = True  # who is told what has changed: look at every origin
    changed: dict[str, None] = field(default_factory=dict)  # else at these, in order


class Stability:
    """One node's part in it. `me` is its id."""

    def __init__(self, me: str) -> None:
        self.me = me
        self._neighbours: dict[str, _Neighbour] = {}
        self._next: dict[str, str] = {}  # origin -> the neighbour to tell; of the present ones
        self._digest: Mapping[str, tuple[int, int]] = {}  # ours, as last looked at
        self._live: Iterable[str] = ()  # who was last asked about, and the sum of the hashes
        self._wanted = 0

    def up(self, peer: str) -> None:
        """A new stream to `peer`: nothing has been said on it."""
        self._neighbours[peer] = _Neighbour()
        self._move()

    def down(self, peer: str) -> None:
        """There is no stream to `peer` any more."""
        self._neighbours.pop(peer, None)
        self._move()

    def _move(self) -> None:
        self._next.clear()
        for neighbour in self._neighbours.values():
            neighbour.moved = True

    def take(self, peer: str, seen: Seen) -> None:
        """What a neighbour told."""
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            return
        if seen.whole:
            for origin in neighbour.heard:
                self._note(origin)
            neighbour.heard.clear()
        for origin, reach in seen.entries.items():
            self._note(origin)
            if reach == NONE:
                neighbour.heard.pop(origin, None)
            elif origin in neighbour.heard or len(neighbour.heard) < ORIGINS_MAX:
                neighbour.heard[origin] = reach

    def tell(self, peer: str, digest: Mapping[str, tuple[int, int]]) -> Seen | None:
        """What to tell `peer` now; None if it knows. `digest` is what we have of each origin: a
        new one whenever that has changed."""
        neighbour = self._neighbours.get(peer)
        if neighbour is None:
            return None
        self._look(digest)
        whole = neighbour.tellings % WHOLE_EVERY == 0
        neighbour.tellings += 1
        origins: Iterable[str] = digest if whole or neighbour.moved else neighbour.changed
        neighbour.moved, neighbour.changed = False, {}
        told = neighbour.told
        entries: dict[str, Reach] = {}
        for origin in origins:
            if origin not in digest:
                continue
            version = digest[origin][0]
            if origin != self.me and self._toward(origin) == peer:
                reach = self._reach(origin, version)
                if whole or told.get(origin) != reach:
                    entries[origin] = told[origin] = reach
            elif origin in told:
                del told[origin]
                entries[origin] = NONE
        return Seen(entries, whole) if entries or whole else None

    def stable(self, version: int, live: Iterable[str]) -> int:
        """Up to which of our versions all of `live` have our records; 0 if that is not known.
        `version` is the one that we have published; a `live` that is given again is not summed
        again."""
        if live is not self._live:
            self._live = live
            self._wanted = sum(map(position, {self.me, *live})) % CIRCLE
        reach = self._reach(self.me, version)
        return reach.version if reach.members == self._wanted else 0

    def _look(self, digest: Mapping[str, tuple[int, int]]) -> None:
        """See what of ours has changed."""
        if digest is not self._digest:
            before, self._digest = self._digest, digest
            for origin, have in digest.items():
                if before.get(origin) != have:
                    self._note(origin)

    def _note(self, origin: str) -> None:
        """What is to be told of an origin may have changed."""
        neighbour = self._neighbours.get(self._toward(origin))
        if neighbour is not None and not neighbour.moved:
            neighbour.changed[origin] = None

    def _reach(self, origin: str, version: int) -> Reach:
        members = position(self.me)
        for neighbour in self._neighbours.values():
            heard = neighbour.heard.get(origin)
            if heard:
                version = min(version, heard.version)
                members += heard.members
        return Reach(version, members % CIRCLE)

    def _toward(self, origin: str) -> str:
        """The neighbour nearest to `origin`, if it is nearer than we are; else nothing."""
        hop = self._next.get(origin)
        if hop is None:
            nearest = (distance(self.me, origin), "")
            for peer in self._neighbours:
                nearest = min(nearest, (distance(peer, origin), peer))
            if len(self._next) >= ORIGINS_MAX:
                self._next.clear()  # a neighbour speaks of origins that do not exist
            hop = self._next[origin] = nearest[1]
        return hop
